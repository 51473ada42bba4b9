"""paramiko's transport as consoles need it: one request to log in, bounded, and old algorithms where allowed.

What SSH servers of the years before 2014 speak is switched on for one console at a time, never for nodes.
paramiko has dropped SHA-1 key exchange and SHA-1 RSA signatures; a BMC whose firmware will never be updated
has nothing else. It comes last in the order of preference, so a server that can do better does.
"""

from __future__ import annotations

import time
from hashlib import sha1
from typing import Any

import paramiko
import paramiko.transport
from cryptography.hazmat.primitives import hashes
from paramiko.common import cMSG_SERVICE_REQUEST
from paramiko.kex_group14 import KexGroup14SHA256

# paramiko's tables of algorithms are not part of its typed interface; subclasses extend them.
_Base: Any = paramiko.transport.ServiceRequestingTransport

WEAK = {
    "ciphers": ["aes128-cbc", "aes192-cbc", "aes256-cbc", "3des-cbc"],
    "macs": ["hmac-sha1", "hmac-sha1-96", "hmac-md5", "hmac-md5-96"],
}
"""What paramiko offers by itself and a console must not be given unasked, in `disabled_algorithms` form."""


class ConsoleTransport(_Base):  # type: ignore[misc]
    """Asks for the login service once, as strict servers demand, and waits for the answer within a limit."""

    def ensure_session(self) -> None:
        if self._service_userauth_accepted:
            return
        request = paramiko.Message()
        request.add_byte(cMSG_SERVICE_REQUEST)
        request.add_string("ssh-userauth")
        self._send_message(request)
        deadline = time.monotonic() + self.auth_timeout
        while not self._service_userauth_accepted:
            if not self.is_active():
                raise paramiko.SSHException("the connection was closed")
            if time.monotonic() > deadline:
                raise paramiko.AuthenticationException("Authentication timeout.")
            time.sleep(0.01)
        self.auth_handler = self.get_auth_handler()


class _Group14Sha1(KexGroup14SHA256):
    name = "diffie-hellman-group14-sha1"
    hash_algo = sha1


class _Group1Sha1(_Group14Sha1):
    """The 1024-bit group of RFC 2409, section 6.2."""

    name = "diffie-hellman-group1-sha1"
    P = int(
        "FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74"
        "020BBEA63B139B22514A08798E3404DDEF9519B3CD3A431B302B0A6DF25F1437"
        "4FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7ED"
        "EE386BFB5A899FA5AE9F24117C4B1FE649286651ECE65381FFFFFFFFFFFFFFFF",
        16,
    )


class _Sha1RsaKey(paramiko.RSAKey):
    HASHES = {**paramiko.RSAKey.HASHES, "ssh-rsa": hashes.SHA1}  # type: ignore[misc]  # noqa: RUF012


class OldTransport(ConsoleTransport):
    """The same, which also speaks SHA-1 with a server that knows nothing else."""

    _preferred_kex = (*_Base._preferred_kex, _Group14Sha1.name, _Group1Sha1.name)
    _preferred_keys = (*_Base._preferred_keys, "ssh-rsa")
    _kex_info = {  # noqa: RUF012
        **_Base._kex_info,
        _Group14Sha1.name: _Group14Sha1,
        _Group1Sha1.name: _Group1Sha1,
    }
    _key_info = {**_Base._key_info, "ssh-rsa": _Sha1RsaKey}  # noqa: RUF012
