"""`python -m metalearn` is the `metalearn` command."""

from metalearn.experiments.main import console

if __name__ == "__main__":
    console()
