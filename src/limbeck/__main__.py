"""``python -m limbeck``, and so ``torchrun --nproc-per-node N -m limbeck``."""

from limbeck.cli import console

if __name__ == "__main__":
    console()
