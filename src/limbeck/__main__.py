"""``python -m limbeck``, and so ``torchrun --nproc-per-node N -m limbeck``."""

from limbeck.cli import main

if __name__ == "__main__":
    main()
