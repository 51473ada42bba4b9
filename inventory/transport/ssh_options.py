"""asyncssh's options for a node: built once for all that share them, since building reads keys and files.

ssh_config is asyncssh's reading of it, under the name or address that ``ssh`` would be given. What that
reading leaves out is in docs/transport.md.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncssh

from inventory.errors import UsageError
from inventory.fleet import Node
from inventory.transport.known_hosts import KnownHosts
from inventory.transport.settings import SshSettings

# The order decides the controller's CPU time per node: AES-GCM and P-256 are fast by hardware or assembly.
_CIPHERS = ["aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "chacha20-poly1305@openssh.com"]
_CIPHERS += ["aes128-ctr", "aes192-ctr", "aes256-ctr"]
_KEX = ["ecdh-sha2-nistp256", "curve25519-sha256", "curve25519-sha256@libssh.org", "ecdh-sha2-nistp384"]
_KEX += ["ecdh-sha2-nistp521", "diffie-hellman-group16-sha512", "diffie-hellman-group18-sha512"]
_KEX += ["diffie-hellman-group14-sha256", "diffie-hellman-group-exchange-sha256"]

_GLOBAL_KNOWN_HOSTS = ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")


@dataclass(frozen=True, slots=True)
class Target:
    """Where and how to connect, after the node, the settings and ssh_config have had their say."""

    name: str
    host: str
    port: int
    user: str
    jump: str | None
    proxy_command: tuple[str, ...]
    host_key_names: tuple[str, ...]
    known_hosts: KnownHosts
    options: asyncssh.SSHClientConnectionOptions


class SshOptions:
    """Targets of nodes. Raises UsageError for a broken ssh_config and for keys that cannot be read."""

    def __init__(self, settings: SshSettings) -> None:
        self._settings = settings
        self._config = _config_files(settings)
        self._known: dict[tuple[str, ...], KnownHosts] = {}
        self._keys: dict[tuple[tuple[str, ...], tuple[str, ...]], list[asyncssh.SSHKeyPair]] = {}
        self._shared: dict[tuple[str | None, str | None], asyncssh.SSHClientConnectionOptions] = {}

    def target(self, node: Node) -> Target:
        template = self._template(node)
        options: Any = copy.copy(template)
        if not self._config:
            options.host = options.orig_host = node.host
            options.port = node.port or 22
        alias = options.host_key_alias
        if options.client_keys is not None:
            # A key pair remembers the signature algorithm of the server that it last met.
            options.client_keys = [copy.copy(pair) for pair in options.client_keys]
        jump = node.jump if node.jump is not None else options.tunnel
        return Target(
            name=node.name,
            host=options.host,
            port=options.port,
            user=options.username,
            jump=jump if isinstance(jump, str) and jump.lower() != "none" else None,
            proxy_command=tuple(options.proxy_command or ()) if node.jump is None else (),
            host_key_names=(alias,) if alias else tuple(dict.fromkeys((options.host, node.host, node.name))),
            known_hosts=self._known_hosts(options.config),
            options=options,
        )

    def _template(self, node: Node) -> asyncssh.SSHClientConnectionOptions:
        """With no ssh_config only user and key tell nodes apart; with one, its patterns may."""
        if self._config:
            return self._build(node)
        key = (node.user, node.identity)
        if key not in self._shared:
            self._shared[key] = self._build(node)
        return self._shared[key]

    def _build(self, node: Node) -> asyncssh.SSHClientConnectionOptions:
        chosen: dict[str, Any] = {"host": node.host, "config": list(self._config) or None}
        user = node.user or self._settings.user
        if user:
            chosen["username"] = user
        if node.port:
            chosen["port"] = node.port
        try:
            config = asyncssh.SSHClientConnectionOptions(
                **chosen, known_hosts=b"", client_keys=None, kbdint_auth=False, password_auth=False
            ).config
            if not config.get("Ciphers"):
                chosen["encryption_algs"] = _CIPHERS
            if not config.get("KexAlgorithms"):
                chosen["kex_algs"] = _KEX
            options: Any = asyncssh.SSHClientConnectionOptions(
                **chosen,
                known_hosts=b"",
                client_keys=self._client_keys(node, config),
                # Expensive on 2,000 nodes and never worth it for a few kilobytes of text.
                compression_algs=["none"],
                # Nobody is there to type, and every refused method is a round trip on every node.
                kbdint_auth=False,
                password_auth=False,
                # The phases have limits of their own, and silence is watched once a command runs.
                login_timeout=0,
                keepalive_interval=0,
                x509_trusted_certs=None,
                agent_forwarding=False,
                agent_identities=self._agent_identities(config),
                agent_path=() if self._settings.agent else "",
            )
        except asyncssh.ConfigParseError as error:
            raise UsageError(f"ssh_config: {error}") from error
        except (OSError, asyncssh.KeyImportError, asyncssh.KeyEncryptionError, ValueError) as error:
            raise UsageError(f"{node.name}: SSH cannot be set up: {error}") from error
        if not options.agent_path:
            options.agent_path = None
        return options  # type: ignore[no-any-return]

    def _client_keys(self, node: Node, config: Any) -> Any:
        """Key pairs to offer. ssh_config may name keys that do not exist, as for OpenSSH; a node may not."""
        identities = (node.identity,) if node.identity else self._settings.identities
        certificates: tuple[str, ...] = ()
        if identities:
            paths = tuple(os.path.expanduser(identity) for identity in identities)
            for path in paths:
                if not os.path.isfile(path):
                    raise UsageError(f"{node.name}: private key {path} does not exist: check `identity`")
        else:
            paths = _existing(config.get("IdentityFile", ()))
            certificates = _existing(config.get("CertificateFile", ()))
        key = (paths, certificates)
        if key not in self._keys:
            self._keys[key] = list(
                asyncssh.load_keypairs(list(paths), certlist=list(certificates), ignore_encrypted=True)
                if paths
                else asyncssh.SSHClientConnectionOptions(
                    config=None, client_certs=list(certificates), agent_path=""
                ).client_keys
                or ()
            )
        # An empty list would make asyncssh look for the default keys again, for every node.
        return self._keys[key] or []

    def _agent_identities(self, config: Any) -> list[str] | None:
        """Under IdentitiesOnly the agent is asked for the named keys alone; None: for all that it has."""
        if not config.get("IdentitiesOnly"):
            return None
        named = config.get("IdentityFile", ["~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa"])
        return list(_existing(f"{path}.pub" for path in named)) or None

    def _known_hosts(self, config: Any) -> KnownHosts:
        files = self._settings.known_hosts
        if not files:
            user = config.get("UserKnownHostsFile", ["~/.ssh/known_hosts", "~/.ssh/known_hosts2"])
            files = (*user, *config.get("GlobalKnownHostsFile", _GLOBAL_KNOWN_HOSTS))
        if files not in self._known:
            self._known[files] = KnownHosts(files)
        return self._known[files]


def _config_files(settings: SshSettings) -> tuple[str, ...]:
    if settings.config_files is None:
        usual = (Path("~/.ssh/config").expanduser(), Path("/etc/ssh/ssh_config"))
        return tuple(str(path) for path in usual if os.access(path, os.R_OK))
    for path in settings.config_files:
        if not os.access(os.path.expanduser(path), os.R_OK):
            raise UsageError(f"{path}: no such ssh_config file, or it cannot be read")
    return tuple(os.path.expanduser(path) for path in settings.config_files)


def _existing(paths: Any) -> tuple[str, ...]:
    expanded = (os.path.expanduser(str(path)) for path in paths)
    return tuple(path for path in expanded if os.path.isfile(path))
