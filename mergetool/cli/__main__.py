"""``python -m mergetool.cli``: the command line where no script is installed."""

from mergetool.cli import main

if __name__ == "__main__":
    main()
