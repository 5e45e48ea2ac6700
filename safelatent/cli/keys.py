"""`safelatent key new` makes an API key. Standard library only: operators need no extra for it."""

import argparse
import hashlib
import re
import secrets
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

KEY_PREFIX = "slk_"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="safelatent", description="Safe Latent Diffusion.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    key = commands.add_parser("key", help="API keys of the service")
    actions = key.add_subparsers(required=True, metavar="ACTION")
    new = actions.add_parser(
        "new",
        help="make an API key",
        description="Prints a new key on stdout, once, and on stderr the lines with its hash that "
        "go into the policy file. Nothing is stored.",
    )
    new.add_argument(
        "--tenant", type=_tenant, default="default", help="whose key; 'default' when not given"
    )
    new.add_argument(
        "--expires",
        type=_days,
        metavar="DAYS",
        help="how long it is valid; for ever when not given",
    )
    new.set_defaults(run=new_key)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


def new_key(arguments: argparse.Namespace) -> None:
    """Print a key of 256 random bits, and what the policy file says of it."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    fields = {
        "id": f'"{secrets.token_hex(4)}"',
        "sha256": f'"{hashlib.sha256(key.encode()).hexdigest()}"',
    }
    if arguments.expires:
        until = datetime.now(UTC) + timedelta(days=arguments.expires)
        fields["expires"] = until.strftime("%Y-%m-%dT%H:%M:%SZ")
    entry = ", ".join(f"{name} = {value}" for name, value in fields.items())
    print(
        "# For the policy file (SAFELATENT_POLICY_FILE). A tenant that is already there gets only\n"
        "# the part in braces, as one more of its keys. The key itself is not shown again.\n"
        f"[tenants.{arguments.tenant}]\n"
        f"keys = [{{ {entry} }}]",
        file=sys.stderr,
        flush=True,
    )
    print(key)


def _tenant(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9-]{1,40}", name):
        raise argparse.ArgumentTypeError(
            f"{name!r} is no tenant's name: 1 to 40 of a-z, 0-9 and '-', as in 'acme-2'"
        )
    return name


def _days(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,4}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of days: 1 to 99999")
    return int(text)
