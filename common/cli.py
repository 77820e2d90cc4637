"""`pcs`, the command line. Nothing heavy is imported before a command needs it, so help and lists answer at once."""

import argparse
import importlib
import os
import shutil
import sys

PAPER_COMMANDS = {"train": "train", "reproduce": "reproduce"}  # command -> module of the paper's folder
MODULE_COMMANDS = {
    "evaluate": "common.evaluation.benchmark",
    "report": "common.evaluation.report",
    "world": "common.toyworld.show",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and whose help fits 80 columns."""

    def __init__(self, **settings) -> None:
        width = min(80, shutil.get_terminal_size().columns)
        super().__init__(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=width), **settings)

    def error(self, message: str) -> None:
        self.exit(2, f"pcs: error: {message} ({self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 if `doctor` found something broken, 2 after an error, 130 if stopped."""
    argv = sys.argv[1:] if argv is None else list(argv)
    show_traceback = argv[:1] == ["--traceback"]
    if show_traceback:
        del argv[0]
    try:
        return _dispatch(argv)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("pcs: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:  # what our code raises for bad input; anything else is a bug and stays whole
        if show_traceback:
            raise
        print(f"pcs: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _dispatch(argv: list[str]) -> int:
    """Hand a command to the module that does its work; modules with their own options get theirs unread."""
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command in MODULE_COMMANDS:
        return _run_main(MODULE_COMMANDS[command], f"pcs {command}", rest)
    if command in PAPER_COMMANDS and rest and not rest[0].startswith("-"):
        from common import papers_index

        slug = papers_index.find_paper(rest[0], papers_index.PAPERS).name
        return _run_main(f"papers.{slug}.{PAPER_COMMANDS[command]}", f"pcs {command} {slug}", rest[1:])

    parser = _build_parser()
    if not argv:
        parser.print_help()
        return 0
    args = parser.parse_args(argv)
    if args.command == "list":
        from common.cli_papers import print_papers

        return print_papers()
    if args.command == "show":
        from common.cli_papers import print_paper

        return print_paper(args.slug)
    if args.command == "generate":
        from common.cli_generate import generate

        return generate(args)
    if args.command == "new":
        from common.cli_new import print_new_paper

        return print_new_paper(args.name, args.source)
    from common.doctor import print_report

    return print_report()


def _run_main(module: str, prog: str, arguments: list[str]) -> int:
    """Call `module.main(arguments)` with the program name that its help should show."""
    sys.argv = [prog, *arguments]
    return importlib.import_module(module).main(arguments) or 0


def _build_parser() -> Parser:
    parser = Parser(prog="pcs", description="Personalized content synthesis: papers reproduced on one shared layer.")
    parser.epilog = (
        "SLUG is a folder's name under papers/. train, reproduce, evaluate, report and world have "
        "options of their own: pcs train SLUG --help, pcs world --help."
    )
    parser.add_argument("--traceback", action="store_true", help="before COMMAND: show where an error came from")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    commands.add_parser("list", help="the papers, and how many of their claims hold")
    show = commands.add_parser("show", help="one paper's card and commands")
    show.add_argument("slug", metavar="SLUG")
    for command, text in (
        ("train", "train a paper's method on your images"),
        ("reproduce", "measure a paper's claims in the toy world"),
    ):
        sub = commands.add_parser(command, help=text, usage=f"pcs {command} SLUG [options of the paper]")
        sub.add_argument("slug", metavar="SLUG", help=f"its options: pcs {command} SLUG --help")
    _add_generate_options(commands.add_parser("generate", help="make images or clips with a trained artifact"))
    commands.add_parser("evaluate", help="run a benchmark on a trained method", add_help=False)
    commands.add_parser("report", help="write the HTML report of an evaluation", add_help=False)
    new = commands.add_parser("new", help="start a new method from a copy of a paper's folder")
    new.add_argument("name", metavar="NAME", help="the new slug: lower-case letters, digits and _")
    new.add_argument("--from", dest="source", metavar="SLUG", required=True, help="the paper to copy")
    commands.add_parser("doctor", help="check this machine and the installation")
    commands.add_parser("world", help="show pictures of the toy world", add_help=False)
    return parser


def _add_generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--artifact", required=True, metavar="PATH", help="a .safetensors file or a trained folder")
    parser.add_argument("--prompt", required=True, help="text, with the placeholder that was trained")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one image or clip for each seed (default: 0)")
    parser.add_argument(
        "--output", default="generated.png", metavar="FILE", help="PNG; MP4 or GIF for clips (default: generated.png)"
    )
    parser.add_argument("--backbone", metavar="NAME", help="name or folder (default: the one it was trained on)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the method's)")
    parser.add_argument("--guidance-scale", type=float, metavar="S", help="1 = off (default: the method's)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, ... (default: cuda where there is one)")


if __name__ == "__main__":
    sys.exit(main())
