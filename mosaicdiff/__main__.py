"""`python -m mosaicdiff`, and so `torchrun -m mosaicdiff`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="mosaicdiff")
