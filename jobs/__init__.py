"""What one runs: the `ldm` command and one thin entry point for each stage."""

import sys

import ldm


def _refuse_another_ldm() -> None:
    """Exits with one line where `import ldm` found another package of that name (CompVis's, say)."""
    if getattr(ldm, "DISTRIBUTION", None) == "ldm-pipelines":
        return
    found = getattr(ldm, "__file__", None) or next(iter(ldm.__path__))  # the latter without an __init__.py
    print(
        f"ldm={found}: is another package of that name, not ldm-pipelines; take it out of PYTHONPATH,"
        " or install ldm-pipelines in an environment of its own",
        file=sys.stderr,
    )
    sys.exit(2)


_refuse_another_ldm()
