"""One folder per paper. The folder's name is the paper's slug; no paper imports another."""
