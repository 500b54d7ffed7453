"""``python -m fused_adamp doctor``: what runs here and why. ``python -m fused_adamp verify``: is it right here."""

from __future__ import annotations

import argparse
import platform
import sys
from collections import defaultdict

import torch

import fused_adamp
from fused_adamp.backends import BACKENDS, ENVIRONMENT, available, choose
from fused_adamp.backends.cpu import load
from fused_adamp.verify import cases, check


def doctor() -> int:
    """Prints versions, devices and, per device, which backend would run and why the others would not."""
    print(f"fused_adamp  {fused_adamp.__version__}")
    print(f"torch        {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"python       {platform.python_version()} on {platform.platform()}")
    extension = load()
    print(f"extension    {extension or 'loaded, runs ' + torch.ops.fused_adamp.instruction_set() + ' instructions'}")
    for device in _devices():
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        print(f"\n{device} ({name})")
        chosen = choose(device, backend=None, fused=None, foreach=None)
        for backend in BACKENDS:
            reason = backend.unavailable(device)
            verdict = reason or ("runs by default" if backend is chosen else f"runs with backend={backend.name!r}")
            print(f"  {backend.name:<10} {verdict}")
    print(f"\nThe environment variable {ENVIRONMENT} forces a backend by name.")
    return 0


def verify() -> int:
    """Checks every available backend against the reference; prints the worst errors; 1 if any case fails."""
    failed = 0
    print(f"{len(cases())} cases per backend; worst error in units of the last place of the stored dtype\n")
    print(f"{'device':<8} {'backend':<10} {'dtype':<10} {'tensor':<16} {'worst':>8} {'allowed':>8}")
    for device in _devices():
        for backend in available(device):
            worst: defaultdict[tuple[torch.dtype, str, float], float] = defaultdict(float)
            failures = []
            for case in cases(backend.geometry(2, 1 << 30)[1]) if backend.fused else cases():
                outcome = check(case, backend.name, device)
                for tensor, error in outcome.error.items():
                    place = case.dtype, tensor, outcome.allowed[tensor]
                    worst[place] = max(worst[place], error)
                if not outcome.passed():
                    failures.append(f"FAILED {case}: {outcome}")
            for (dtype, tensor, allowed), error in worst.items():
                name = str(dtype).removeprefix("torch.")
                print(f"{device!s:<8} {backend.name:<10} {name:<10} {tensor:<16} {error:8.2f} {allowed:8.2f}")
            print("\n".join(failures), end="\n" if failures else "")
            failed += len(failures)
    print(f"\n{'FAILED' if failed else 'passed'}: {failed} failures")
    return int(failed > 0)


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_adamp", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (doctor, verify):
        assert command.__doc__
        commands.add_parser(command.__name__, help=command.__doc__).set_defaults(run=command)
    status: int = parser.parse_args().run()
    return status


if __name__ == "__main__":
    sys.exit(main())
