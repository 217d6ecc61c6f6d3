"""``python -m kd_train`` is ``kd-train``, which ``torchrun -m`` can start."""

from kd_train.cli.train import main

if __name__ == "__main__":
    main()
