"""`python -m saddle` is the command `saddle`."""

from saddle.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
