"""`python -m bench VERB`: run a measurement; without a verb, list them."""

import sys

import tyro

from . import static

VERBS = {"static": static.main}  # what the kernels compile to, without a GPU


def main() -> None:
    """Hand the command line to the verb that it begins with."""
    verb, *arguments = sys.argv[1:] or [""]
    if verb not in VERBS:
        print("usage: python -m bench VERB [--help]", *(f"  {name}" for name in VERBS), sep="\n")
        raise SystemExit(2 if verb else 0)
    tyro.cli(VERBS[verb], args=arguments, prog=f"python -m bench {verb}")


if __name__ == "__main__":
    main()
