"""The lab's command line: ``python -m guest_tests.lab``."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from guest_tests.lab.bundles import cached_versions, fetch
from guest_tests.lab.cache import cache_directory
from guest_tests.lab.errors import GuestCallError, LabError
from guest_tests.lab.initramfs import build
from guest_tests.lab.kbuild import BUILT_KERNEL, RECIPES, build_kernel
from guest_tests.lab.kernels import debian_kernel
from guest_tests.lab.machine import Image, VirtualMachine
from guest_tests.lab.manifest import GUEST, KERNELS, QEMU
from guest_tests.lab.qemu import choose_qemu
from guest_tests.lab.server import ViommuServer
from guest_tests.lab.userland import Userland
from viommu.errors import ViommuError

_RUN_HELP = """\
example: python -m guest_tests.lab run --kernel 6.12 --endpoint 00:06.0=edu
    --call 'dma.strays bdf=00:06.0' --call system.kernel_log"""


def main(arguments: list[str] | None = None) -> int:
    """Carry out a command; return the exit status: 0, 1 a call failed, 2 the lab can't."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except GuestCallError as error:
        print(error, file=sys.stderr)
        return 1
    except (LabError, ViommuError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m guest_tests.lab", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("fetch", help="fill the cache: QEMU, kernels, user space")
    command.add_argument("--refresh", action="store_true", help="again, at the newest versions")
    command.set_defaults(command=_fetch)

    command = commands.add_parser(
        "build-kernels", help=f"build Linux {', '.join(RECIPES)} from source"
    )
    command.set_defaults(command=_build_kernels)

    command = commands.add_parser(
        "run",
        help="serve, boot a kernel, call functions of guest_tests.guest in it",
        epilog=_RUN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--kernel", choices=[*KERNELS, BUILT_KERNEL], default=next(iter(KERNELS)))
    command.add_argument("--endpoint", action="append", metavar="BDF=KIND", default=[])
    command.add_argument("--append", default="", help="more for the kernel's command line")
    command.add_argument("--smp", type=int, default=1, metavar="N")
    command.add_argument("--call", action="append", metavar="'M.F [K=V...]'", default=[])
    command.add_argument("--console", action="store_true", help="print the console at the end")
    command.set_defaults(command=_run)
    return parser


def _fetch(options: argparse.Namespace) -> None:
    fetch([GUEST, *KERNELS.values()], refresh=options.refresh)
    if options.refresh:
        fetch([QEMU], refresh=True)
    qemu = choose_qemu()
    for name, version in cached_versions().items():
        print(f"{name:<12}  {version}")
    print(f"QEMU {qemu.version_text}: {qemu.path}")
    print(f"cache: {cache_directory()}")


def _build_kernels(options: argparse.Namespace) -> None:
    for name in RECIPES:
        kernel = build_kernel(name)
        print(f"Linux {kernel.release}: {kernel.image}")


def _run(options: argparse.Namespace) -> None:
    kernel = build_kernel() if options.kernel == BUILT_KERNEL else debian_kernel(options.kernel)
    userland = Userland(fetch([GUEST])[GUEST.name])
    image = Image(kernel, build(kernel, userland), options.append)
    endpoints = dict(text.split("=", 1) for text in options.endpoint or ["00:06.0=edu"])
    with tempfile.TemporaryDirectory(prefix="viommu-lab.") as directory:
        home = Path(directory)
        with (
            ViommuServer(home / "serve", "00:05.0", endpoints) as server,
            VirtualMachine(
                choose_qemu(), image, server.qemu_arguments(), home, smp=options.smp
            ) as machine,
        ):
            print(f"booted: {machine.wait_for_boot()}")
            for text in options.call:
                function, *pairs = shlex.split(text)
                result = machine.call(function, **dict(map(_argument, pairs)))
                print(f"{text}: {json.dumps(result, indent=1)}")
            if options.console:
                print(machine.console())


def _argument(pair: str) -> tuple[str, Any]:
    """Return the name and value of ``name=value``; a value that isn't JSON is a string."""
    name, _, value = pair.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    sys.exit(main())
