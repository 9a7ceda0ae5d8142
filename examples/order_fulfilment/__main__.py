"""Runs the orders, shows how they fare, and audits the books; exits with 1 if anything is out of place."""

import argparse
import asyncio
import sqlite3
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Final

from examples.order_fulfilment import outcomes
from examples.order_fulfilment.audit import Check, audit
from examples.order_fulfilment.books import read_books
from examples.order_fulfilment.faults import deal
from examples.order_fulfilment.forecast import prospects
from examples.order_fulfilment.fulfilment import Fulfilment, fulfil
from examples.order_fulfilment.orders import Order, read_orders
from examples.order_fulfilment.progress import Progress
from examples.order_fulfilment.shop import DATABASES

ORDERS: Final = Path(__file__).with_name("orders.jsonl")
REPORTS: Final = "reports.jsonl"
INTERRUPTED: Final = 130
"""The exit code of a program that was stopped with Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example.

    Returns:
        The exit code: 0 if all is in place, 1 if not, 130 if it is and Ctrl-C cut the run short.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.audit is not None:
        try:
            return _audit(options.audit, *_read(options.audit))
        except (OSError, ValueError, sqlite3.Error) as error:
            parser.error(f"expected a folder that --keep left, got {options.audit}: {error}")
    try:
        orders = read_orders(options.orders)[: options.first]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.keep is not None and any((options.keep / name).exists() for name in DATABASES):
        parser.error(f"expected a folder without databases, got {options.keep}; audit what is in it with --audit")
    folder = tempfile.TemporaryDirectory() if options.keep is None else nullcontext(options.keep)
    with folder as name:
        path = Path(name)
        path.mkdir(parents=True, exist_ok=True)
        fulfilments = _run(path, orders, options)
        if options.keep is not None:
            _write(path, orders, fulfilments)
        code = _audit(path, orders, fulfilments)
    return INTERRUPTED if code == 0 and len(fulfilments) < len(orders) else code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.order_fulfilment", description=__doc__)
    parser.add_argument(
        "--orders", type=Path, default=ORDERS, metavar="FILE", help="the orders, one JSON object a line (default: its own 1,000)"
    )
    parser.add_argument("--first", type=_count, metavar="N", help="only the first so many of them")
    parser.add_argument("--concurrency", type=_count, default=16, metavar="N", help="sagas at a time (default: %(default)s)")
    parser.add_argument(
        "--faults", type=_share, default=0.27, metavar="SHARE", help="share of the orders that meet a fault (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1992, metavar="N", help="which orders meet which fault (default: %(default)s)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--keep", type=Path, metavar="DIR", help="keep the databases and the reports there")
    where.add_argument("--audit", type=Path, metavar="DIR", help="run nothing; audit what --keep left there")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return share


def _run(folder: Path, orders: list[Order], options: argparse.Namespace) -> list[Fulfilment]:
    # Faults go to orders that would succeed without: so each fault strikes, and each order's end is known beforehand.
    certain = [order_id for order_id, its in prospects(orders).items() if its.are_certain]
    faults = deal(certain, round(options.faults * len(orders)), options.seed)
    print(f"{len(orders):,} orders, {options.concurrency} at a time, {len(faults):,} of them with an injected fault\n")
    progress = Progress(len(orders), sys.stdout)
    fulfilments = asyncio.run(fulfil(orders, folder, faults, concurrency=options.concurrency, on_report=progress.count))
    progress.end()
    seconds = progress.seconds
    if len(fulfilments) < len(orders):
        print(f"\nInterrupted: {len(orders) - len(fulfilments):,} orders were not begun, and those in flight were undone.")
    print(f"\n{len(fulfilments):,} sagas in {seconds:.1f} s, {len(fulfilments) / seconds:,.0f} a second\n")
    print(f"Outcomes\n{outcomes.outcomes(fulfilments)}\n")
    if faults:
        print(f"Faults that struck, by stage\n{outcomes.faults(fulfilments)}\n")
    example = outcomes.most_eventful(fulfilments)
    if example is not None:
        print(f"One of the reports\n\n{example.report}\n")
    return fulfilments


def _audit(folder: Path, orders: list[Order], fulfilments: list[Fulfilment]) -> int:
    checks = audit(read_books(folder), fulfilments, prospects(orders))
    print("Audit")
    for check in checks:
        print(_line(check))
    out_of_place = [problem for check in checks for problem in check.out_of_place]
    if not out_of_place:
        print("\nThe books agree: not a cent, not an item out of place.")
        return 0
    print(f"\nOut of place: {len(out_of_place):,}")
    for problem in out_of_place:
        print(f"  {problem}")
    return 1


def _line(check: Check) -> str:
    return f"  {'wrong' if check.out_of_place else 'right'}  {check.claim:<48}  {check.figures}"


def _write(folder: Path, orders: list[Order], fulfilments: list[Fulfilment]) -> None:
    for name, rows in (ORDERS.name, orders), (REPORTS, fulfilments):
        (folder / name).write_text("".join(f"{row.model_dump_json()}\n" for row in rows), encoding="utf-8")


def _read(folder: Path) -> tuple[list[Order], list[Fulfilment]]:
    reports = (folder / REPORTS).read_text(encoding="utf-8").splitlines()
    return read_orders(folder / ORDERS.name), [Fulfilment.model_validate_json(line) for line in reports]


if __name__ == "__main__":
    sys.exit(main())
