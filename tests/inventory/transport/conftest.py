from tests.sshd import ssh_keys, sshd, start_sshd

__all__ = ["ssh_keys", "sshd", "start_sshd"]
