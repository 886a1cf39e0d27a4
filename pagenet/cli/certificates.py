"""Makes an authority and a certificate for each host, to try TLS with: ``python -m
pagenet.cli.certificates DIR HOST...``"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..certificates import DAYS, make_certificates
from ..errors import PagenetError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m pagenet.cli.certificates",
        description="Make an authority, and what --tls-dir takes for each host, to try TLS with.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("hosts", nargs="+", metavar="HOST", help="its name or address")
    parser.add_argument("--days", type=int, default=DAYS, help="validity (%(default)s)")
    options = parser.parse_args(argv)
    try:
        make_certificates(options.directory, options.hosts, options.days)
    except PagenetError as error:
        print(f"certificates: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
