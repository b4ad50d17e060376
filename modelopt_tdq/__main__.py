"""``python -m modelopt_tdq``: the program ``modelopt-tdq``, also where its script is not on the path."""

from modelopt_tdq.cli.app import app

if __name__ == "__main__":
    app(prog_name="modelopt-tdq")
