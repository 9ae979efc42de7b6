"""The gateway: nginx before the SuperLink, the one port that clients reach.

It lets nobody in without a certificate of the federation's CA, forwards only what SuperNodes ask
(`/v1/fleet/`), and only where the request is signed by the very node that the certificate's client
was given. What it refuses goes into the log with the reason. nginx runs as an ordinary process of
ours: everything it reads and writes lies in the server's state folder.
"""

from __future__ import annotations

import base64
import grp
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

from deploy.keys import Client, Keys
from deploy.server_config import ServerConfig
from deploy.supervisor import Part, listens
from fedgraft.errors import ConfigError, RunError
from fedgraft.files import write_text

NAME = "gateway"
_MISSING = "nginx is not installed"
_RELOAD_SECONDS = 10.0
_INSTALL = "Install it: apt-get install nginx (Debian, Ubuntu), dnf install nginx (Fedora)."
_NOISE = re.compile(
    r"\[notice\]|closed keepalive connection|while sending to client"
    r"|closed connection while waiting for request"  # as `fedgraft status --parts` does
    # these three have a line of their own, with the client's name
    r"|no required SSL certificate|SSL certificate verify error|plain HTTP request to HTTPS port"
)

_CONFIG = """\
{user}daemon off;
worker_processes auto;
worker_shutdown_timeout 5s;  # after a reload, for what a revoked client still has open
pid {folder}/nginx.pid;
error_log stderr info;

events {{ worker_connections 2048; }}

http {{
  include {folder}/nodes.conf;  # $node: whose node key signs the request

  default_type application/octet-stream;
  server_tokens off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;

  map $ssl_client_s_dn $client {{ default "-"; "~(?:^|,)CN=(?<cn>[^,]+)" $cn; }}
  map $status $refused {{ default 0; "~^[45]" 1; }}
  map $ssl_client_verify $why {{
    default $ssl_client_verify;
    "" "no TLS";
    NONE "none";
    SUCCESS "good";
  }}

  log_format whole escape=json '{{"time": "$time_iso8601", "client": "$client", '
    '"address": "$remote_addr", "request": "$request", "status": $status, '
    '"bytes_in": $request_length, "bytes_out": $bytes_sent, "seconds": $request_time, '
    '"certificate": "$ssl_client_verify"}}';
  log_format refusal 'refused $status: "$request" of client $client at $remote_addr '
    '(certificate: $why; node: $node)';
  access_log {access_log} whole;
  access_log /dev/stdout refusal if=$refused;

  limit_req_zone $client zone=requests:1m rate={rate}r/s;
  limit_req zone=requests burst={burst} delay={rate};
  limit_conn_zone $client zone=connections:1m;
  limit_conn connections {connections};
  # nginx answers 503 to what is above a limit, on which a SuperNode waits and asks again.
  client_max_body_size {body}m;
  client_header_timeout 30s;
  client_body_timeout 60s;
  send_timeout 60s;

  upstream superlink {{
    server 127.0.0.1:{superlink};
    keepalive 16;
    keepalive_timeout 3s;  # shorter than the SuperLink's 5 s, which must not hang up first
  }}

  server {{
    listen {listen} ssl;
    ssl_certificate {server}/server.crt;
    ssl_certificate_key {server}/server.key;
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_ciphers HIGH:!aNULL:!MD5;
    ssl_client_certificate {server}/ca.crt;
    ssl_crl {crl};
    ssl_verify_client on;
    ssl_verify_depth 1;
    # A resumed session would not be asked for its certificate again.
    ssl_session_cache off;
    ssl_session_tickets off;

    location / {{ return 403; }}
    location = /v1/fleet {{ return 403; }}  # or nginx would answer with a redirection

    location /v1/fleet/ {{
      # On 401 a SuperNode ends, as it does where Flower itself does not know its key.
      if ($node != $client) {{ return 401; }}
      # Requests say how long they are, so that one too long is refused before a byte goes on.
      if ($http_transfer_encoding) {{ return 411; }}
      limit_except POST {{ deny all; }}
      # With a path, nginx sends on the one that it has compared, and no other spelling of it.
      proxy_pass https://superlink/v1/fleet/;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
      proxy_ssl_verify on;
      proxy_ssl_verify_depth 1;
      proxy_ssl_trusted_certificate {server}/ca.crt;
      proxy_ssl_name localhost;
      proxy_ssl_protocols TLSv1.2 TLSv1.3;
      # Nothing is kept on disk on its way, so nginx needs no folder that it may write to.
      proxy_request_buffering off;
      proxy_max_temp_file_size 0;
      proxy_connect_timeout 5s;
      proxy_read_timeout 300s;
    }}
  }}
}}
"""


def find_nginx() -> str:
    """Return nginx's path.

    Raises:
        ConfigError: it is not installed; the remedy says how to get it.
    """
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
    found = shutil.which("nginx", path=places)
    if found is None:
        raise ConfigError(_MISSING, _INSTALL)
    return found


def folder_of(config: ServerConfig) -> Path:
    """Return where the gateway's files are."""
    return config.state / "gateway"


def write_config(config: ServerConfig, keys: Keys) -> None:
    """Write all that nginx reads, and let nginx check it.

    Raises:
        ConfigError: nginx refuses it; the message is nginx's own.
    """
    folder = folder_of(config)
    text = _CONFIG.format(
        user=_user(),
        folder=_quoted(folder),
        access_log=_quoted(config.access_log),
        server=_quoted(keys.server),
        crl=_quoted(keys.crl),
        listen=config.listen,
        superlink=config.superlink_port,
        rate=config.limits.requests_per_second,
        burst=4 * config.limits.requests_per_second,
        connections=config.limits.connections,
        body=config.limits.body_mib,
    )
    write_nodes(config, keys.invited().values())
    write_text(folder / "nginx.conf", text)
    config.access_log.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([*_command(config), "-t", "-q"], capture_output=True, text=True)
    if done.returncode:
        said = next(iter(done.stderr.splitlines()), f"exit status {done.returncode}")
        raise ConfigError(
            f"nginx refuses its configuration: {said}", f"Look at {folder / 'nginx.conf'}."
        )


def write_nodes(config: ServerConfig, invited: Iterable[Client]) -> None:
    """Write whose node key is whose, for the next start or `reload` of the gateway."""
    rows = [
        f'  "{base64.b64encode(one.public_key).decode()}" "{one.name}";'
        for one in sorted(invited, key=lambda one: one.name)
    ]
    variable = f"$http_{FLEET_HTTP_PUBLIC_KEY_HEADER.replace('-', '_')}"
    lines = [
        "map_hash_bucket_size 1024;",
        f"map_hash_max_size {max(2048, 4 * len(rows))};",
        f"map {variable} $node {{",
        '  default "?";',  # which no client can be called
        *rows,
        "}",
    ]
    write_text(folder_of(config) / "nodes.conf", "\n".join(lines) + "\n")


def gateway(config: ServerConfig) -> Part:
    """Return the gateway as a part to supervise; `write_config` comes first."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return Part(
        NAME,
        _command(config),
        listens(config.port, host),
        environment=dict(os.environ),
        folder=folder_of(config),
        hides=_NOISE,
    )


def reload(config: ServerConfig) -> None:
    """Let a running gateway read its lists anew, and wait until nobody is let in by the old ones.

    Raises:
        RunError: it goes on with the old lists.
    """
    pid = running_gateway(config)
    try:
        if pid is None:
            return  # it reads the new ones when it comes back
        old = psutil.Process(pid).children()
        os.kill(pid, signal.SIGHUP)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return
    limit = time.monotonic() + _RELOAD_SECONDS
    while any(_accepts(worker) for worker in old):
        if time.monotonic() > limit:
            raise RunError(
                "the gateway did not read who is invited anew", f"See {config.log}, and restart it."
            )
        time.sleep(0.02)


def _accepts(worker: psutil.Process) -> bool:
    """Whether a worker still takes connections: nginx renames one that only finishes its own."""
    with suppress(psutil.Error):
        return worker.is_running() and not any("shutting" in word for word in worker.cmdline())
    return False


def running_gateway(config: ServerConfig) -> int | None:
    """Return the process id of this server's gateway, if it runs."""
    try:
        pid = json.loads(config.parts.read_text())[NAME]["pid"]
    except (OSError, ValueError, KeyError):
        return None
    return pid if isinstance(pid, int) else None


def _command(config: ServerConfig) -> list[str]:
    folder = folder_of(config)
    return [find_nginx(), "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")]


def _quoted(path: Path) -> str:
    """Return a path as one word of nginx's configuration.

    Raises:
        ConfigError: nginx cannot be told of this path.
    """
    text = str(path)
    if re.search(r"[\s;{}\"'\\$#]", text):
        raise ConfigError(
            f"nginx cannot read from {text!r}", "Use a path without spaces and special characters."
        )
    return text


def _user() -> str:
    """Return the line that names whom nginx's workers run as; only root may choose."""
    if os.geteuid() != 0:
        return ""
    for name in ("www-data", "nginx", "nobody"):
        try:
            group = grp.getgrgid(pwd.getpwnam(name).pw_gid).gr_name
        except KeyError:
            continue
        return f"user {name} {group};\n"
    raise ConfigError("there is no user nobody for nginx's workers", "Start as another user.")
