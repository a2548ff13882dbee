"""`python -m dfrot`."""

from dfrot.cli import run

if __name__ == "__main__":
    run()
