"""Filesystems that fill, turn read-only, hang or are absent: real ones, in mount namespaces of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from probes.agent.api import Unsupported
from probes.agent.host import Machine
from probes.checks import storage
from tests.probes.replay import ReplayHost

ROOT = Path(__file__).resolve().parents[3]
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare"), reason="mounting needs root and unshare"
)

PRELUDE = """
import ctypes, json, os, subprocess, sys, tempfile
from probes.agent.host import Machine
from probes.checks import file_io, storage
def mount(*argv):
    subprocess.run(["mount", *argv], check=True)
def show(check, **params):
    host = Machine(params=params)
    measures = [list(m) for m in check(host)]
    print(json.dumps({"measures": measures, "evidence": host.evidence}))
folder = os.environ["FOLDER"]
"""


def in_namespace(script: str, folder: Path) -> dict[str, Any]:
    """What the script's last `show` saw, in a mount namespace that ends with it."""
    ran = subprocess.run(
        ["unshare", "-m", sys.executable, "-B", "-c", PRELUDE + script],
        cwd=ROOT,
        env={**os.environ, "FOLDER": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    answer: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return answer


def of(answer: dict[str, Any], metric: str, device: Any) -> Any:
    found = [value for name, value, where in answer["measures"] if (name, where) == (metric, str(device))]
    assert len(found) == 1, answer
    return found[0]


def test_this_machine_s_filesystems_answer_and_have_room() -> None:
    for check in (storage.space, storage.inodes):
        measures = {(m.metric, m.device): m.value for m in check(Machine(params={}))}
        assert 0 <= measures["used_percent", "/"] <= 100
    hang = {(m.metric, m.device): m.value for m in storage.hang(Machine(params={}))}
    assert hang["hung", "/"] == 0
    assert hang["broken", "/"] == 0


def test_used_space_is_what_df_says() -> None:
    df = subprocess.run(["df", "--output=pcent", "/"], capture_output=True, text=True, check=True).stdout
    measures = {(m.metric, m.device): m.value for m in storage.space(Machine(params={}))}
    assert abs(measures["used_percent", "/"] - int(df.splitlines()[1].strip(" %"))) <= 1.5


@needs_root
def test_a_full_filesystem_is_seen_as_full(tmp_path: Path) -> None:
    script = """
mount("-t", "tmpfs", "-o", "size=1m,nr_inodes=20", "full", folder)
with open(folder + "/fill", "wb") as file:
    file.write(bytes(1020 << 10))
show(storage.space)
"""
    answer = in_namespace(script, tmp_path)
    assert of(answer, "used_percent", tmp_path) > 99


@needs_root
def test_a_filesystem_without_a_free_inode_is_seen_though_it_has_room(tmp_path: Path) -> None:
    script = """
mount("-t", "tmpfs", "-o", "size=1m,nr_inodes=20", "full", folder)
for i in range(19):
    open(folder + "/%d" % i, "w").close()
show(storage.inodes)
"""
    assert of(in_namespace(script, tmp_path), "used_percent", tmp_path) == 100


@needs_root
@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="needs /dev/fuse")
def test_a_mount_whose_server_is_silent_is_named_as_hung_and_the_others_answer(tmp_path: Path) -> None:
    script = """
server = os.open("/dev/fuse", os.O_RDWR)
options = b"fd=%d,rootmode=40000,user_id=0,group_id=0" % server
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mount(b"dead", folder.encode(), b"fuse.dead", 0, options) == 0, ctypes.get_errno()
show(storage.hang, seconds=1.0)
os.close(server)
"""
    answer = in_namespace(script, tmp_path)
    assert of(answer, "hung", tmp_path) == 1
    assert of(answer, "hung", "/") == 0
    assert str(tmp_path) in answer["evidence"][0]


@needs_root
@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="needs /dev/fuse")
def test_a_mount_whose_server_is_gone_is_broken_and_not_hung(tmp_path: Path) -> None:
    script = """
server = os.open("/dev/fuse", os.O_RDWR)
options = b"fd=%d,rootmode=40000,user_id=0,group_id=0" % server
assert ctypes.CDLL(None).mount(b"dead", folder.encode(), b"fuse.dead", 0, options) == 0
os.close(server)
show(storage.hang)
"""
    answer = in_namespace(script, tmp_path)
    assert of(answer, "broken", tmp_path) == 1
    assert of(answer, "hung", tmp_path) == 0


@needs_root
@pytest.mark.skipif(not os.path.exists("/dev/loop-control"), reason="needs loop devices")
def test_a_filesystem_that_the_kernel_gave_up_on_is_found(tmp_path: Path) -> None:
    script = """
image = tempfile.mkdtemp() + "/image"
subprocess.run(["truncate", "-s", "8M", image], check=True)
subprocess.run(["mkfs.ext4", "-q", image], check=True)
mount("-o", "loop,errors=remount-ro", image, folder)
try:
    source = [m.source for m in storage.mounted(Machine()) if m.point == folder][0]
    before = [m.value for m in storage.readonly(Machine()) if m.device == folder]
    assert before == [0], before
    with open("/sys/fs/ext4/%s/trigger_fs_error" % os.path.basename(source), "w") as file:
        file.write("planted")
    show(storage.readonly)
finally:
    subprocess.run(["umount", folder])
    import shutil; shutil.rmtree(os.path.dirname(image))
"""
    answer = in_namespace(script, tmp_path)
    assert of(answer, "readonly", tmp_path) == 1
    assert "after an error" in answer["evidence"][0]


MOUNTINFO = """\
22 1 8:2 / / rw,relatime shared:1 - ext4 /dev/sda2 rw,errors=remount-ro
23 22 0:21 / /proc rw,nosuid - proc proc rw
24 22 0:45 / /dev/shm rw,nosuid - tmpfs tmpfs rw,size=1000k
25 22 8:17 / /data rw,relatime - xfs /dev/sdb1 {data}
26 22 0:50 / /home rw,relatime - nfs4 filer:/home rw,vers=4.2,hard
27 22 7:3 / /snap/core/1 ro,nodev - squashfs /dev/loop3 ro
28 22 8:17 /x /mnt/with\\040blank rw,relatime - xfs /dev/sdb1 rw
29 22 0:60 / /run/user/0 rw - tmpfs tmpfs rw
30 22 8:33 / /archive {archive},relatime - ext4 /dev/sdc1 {archive}
"""


def node(data: str = "rw", archive: str = "ro", **more: Any) -> ReplayHost:
    files = {"/proc/self/mountinfo": MOUNTINFO.format(data=data, archive=archive), **more.pop("files", {})}
    return ReplayHost(files=files, **more)


def test_only_filesystems_with_data_are_asked_and_each_device_once() -> None:
    points = [m.point for m in storage.worth_asking(storage.mounted(node()))]
    assert points == ["/", "/dev/shm", "/data", "/home", "/archive"]


def test_a_filesystem_that_turned_itself_read_only_is_told_from_one_mounted_so() -> None:
    host = node(data="ro,noquota")
    found = {m.device: m.value for m in storage.readonly(host)}
    assert found == {"/": 0, "/dev/shm": 0, "/data": 1, "/home": 0, "/archive": 0}
    assert host.evidence == [
        "/data: mounted rw, but the filesystem has turned read-only, as it does after an error"
    ]


def test_a_read_only_mount_that_fstab_declares_for_writing_is_found() -> None:
    host = node(files={"/etc/fstab": "/dev/sdc1 /archive ext4 defaults 0 2\n"})
    assert {m.device: m.value for m in storage.readonly(host)}["/archive"] == 1
    host = node(files={"/etc/fstab": "/dev/sdc1 /archive ext4 ro 0 2\n"})
    assert {m.device: m.value for m in storage.readonly(host)}["/archive"] == 0


def test_mounts_that_fstab_or_the_inventory_declares_are_compared() -> None:
    fstab = """\
# a comment
UUID=1 / ext4 defaults 0 1
UUID=2 none swap sw 0 0
filer:/home /home nfs4 hard 0 0
filer:/lost /lost nfs4 hard 0 0
/dev/sdz /optional ext4 nofail 0 0
"""
    wanted = {
        "/data": {"type": "xfs", "source": "/dev/sdb1", "options": "rw,relatime"},
        "/archive": {"options": ["rw"]},
        "/home": {"type": "lustre"},
    }
    host = node(files={"/etc/fstab": fstab}, params={"mounts": wanted})
    found = {m.device: m.value for m in storage.mounts(host)}
    assert found == {"/": 0, "/home": 1, "/lost": 1, "/data": 0, "/archive": 1}
    assert host.evidence == [
        "/archive: lacks the option rw",
        "/home: mounted as nfs4, declared as lustre",
        "/lost: not mounted",
    ]


def test_without_any_declaration_nothing_is_missing_and_it_is_said() -> None:
    host = node()
    assert [(m.metric, m.value, m.device) for m in storage.mounts(host)] == [("missing", 0, None)]
    assert "neither" in host.evidence[0]


@pytest.mark.parametrize("mounts", [["/data"], {"/data": "xfs"}])
def test_a_malformed_declaration_is_an_error(mounts: Any) -> None:
    with pytest.raises(ValueError, match="parameter mounts"):
        list(storage.mounts(node(params={"mounts": mounts})))


def test_a_malformed_mountinfo_is_an_error_and_its_absence_unsupported() -> None:
    with pytest.raises(ValueError, match="not a line of mountinfo"):
        list(storage.space(ReplayHost(files={"/proc/self/mountinfo": "22 1 8:2 / /\n"})))
    with pytest.raises(Unsupported):
        list(storage.space(ReplayHost()))


def test_a_mount_without_an_answer_has_no_value_rather_than_a_good_one() -> None:
    host = node()
    found = {m.device: m.value for m in storage.space(host)}
    assert found["/data"] is None
    assert any("/data" in line for line in host.evidence)
