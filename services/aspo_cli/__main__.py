"""`python -m aspo_cli` is the `aspo` command."""

from aspo_cli.main import run

if __name__ == "__main__":
    run()
