"""The recipes that train tiny-sd and its judges from nothing: python -m common.toyworld.pretrain --help"""
