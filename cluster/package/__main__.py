"""`python -m scoreray` is the `scoreray` command."""

from scoreray.cluster.cli.__main__ import main

if __name__ == "__main__":
    main()
