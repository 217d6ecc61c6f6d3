"""``python -m kd_train.sweep`` is ``kd-sweep``, found without a search path."""

from kd_train.sweep.cli import main

main()
