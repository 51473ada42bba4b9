"""The checks themselves, a module a family. They run on nodes: standard library only, Python 3.8 and up."""
