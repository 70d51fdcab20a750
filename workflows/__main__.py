"""`python -m workflows`: the same as the command `ray-ddpm`."""

from workflows.cli.main import script

if __name__ == "__main__":
    script()
