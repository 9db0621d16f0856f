"""`python -m diffusion` is the command deq-ddim."""

from .program.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
