"""nanokv disagg: starts a prefill process for an engine on another host; nanokv/disagg/server.py runs it."""

from __future__ import annotations

import logging
from typing import Any

import click

from nanokv.cli.common import Group, model_folder, model_options
from nanokv.core.config import EngineConfig
from nanokv.core.errors import ConfigError
from nanokv.disagg.config import split_address


@click.group(cls=Group, epilog="\b\nExample:\n  nanokv disagg prefill --listen 10.0.0.2:7000 --secret-file secret")
def disagg() -> None:
    """Prefill on one host and decode on another."""


@disagg.command(
    epilog="\b\nExample, with a file that both hosts have:\n"
    "  (umask 077; head -c 32 /dev/urandom | base64 > secret)\n"
    "  nanokv disagg prefill --listen 10.0.0.2:7000 --secret-file secret     on one host\n"
    "  nanokv chat --disagg 10.0.0.2:7000 --secret-file secret               on the other"
)
@click.option("--listen", required=True, metavar="HOST:PORT", help="Address of this host, for the other one.")
@model_options
@click.option("--codec", default="raw", show_default=True, help="As on the other host.")
@click.option(
    "--native-layers", "--unquantized-layers", default="", metavar="LAYERS",
    help="As on the other host, such as first2,last2.",
)  # fmt: skip
@click.option("--prefill", default="exact", show_default=True, help="As on the other host: exact or fast.")
@click.option("--page-size", type=int, help="As on the other host. Default: as there.")
@click.option("--kv-memory", metavar="SIZE", help="Memory for the pages of prompts in progress, such as 512MiB.")
@click.option("--secret-file", metavar="FILE", help="Secret that the other host has as well; required beyond loopback.")
def prefill(model: str | None, listen: str, secret_file: str | None, **options: Any) -> None:
    """Compute prompts for one engine at a time, until Ctrl-C.

    With --secret-file each side proves to the other that it knows the secret. Nothing is encrypted: use it in networks
    where no other host can read or change what travels.
    """
    try:
        address = split_address(listen)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    config = EngineConfig(**options)
    folder = model_folder(model)
    from nanokv.disagg.secret import is_loopback, read_secret
    from nanokv.disagg.server import listen as serve
    from nanokv.disagg.transport import bind
    from nanokv.disagg.worker import PrefillModel
    from nanokv.engine.device import choose_device, resolve_dtype
    from nanokv.models.read import read_folder

    logging.basicConfig(format="[prefill] %(message)s")
    secret = None if secret_file is None else read_secret(secret_file)
    device = choose_device(config.device).device
    dtype = resolve_dtype(config.dtype, read_folder(folder))
    try:
        server = bind(address)  # before the model is loaded, so that a wrong address fails at once
    except OSError as error:
        raise ConfigError(f"--listen {listen}: {error.strerror or error}") from None
    with server:
        if secret is None and not is_loopback(server.getsockname()[0]):
            raise ConfigError(
                f"--listen {listen}: beyond loopback a shared secret is required: give --secret-file FILE"
            )
        serve(PrefillModel(folder, config, str(device), str(dtype).removeprefix("torch.")), server, secret)
