"""`python -m diffusion` is the command deq-ddim."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
