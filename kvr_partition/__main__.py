"""``python -m kvr_partition`` is the ``kvr-partition`` program."""

from kvr_partition.cli.main import main

if __name__ == "__main__":
    main()
