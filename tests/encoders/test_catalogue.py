"""The catalogue of official files: found, verified, fetched whole or not at all."""

import hashlib
import io
import urllib.error
import urllib.request

import pytest

from hspsam_monai.encoders import catalogue
from hspsam_monai.encoders.catalogue import CATALOGUE, fetch, locate, locate_verified, verify
from hspsam_monai.encoders.state_files import read_state
from hspsam_monai.errors import WeightsError


@pytest.fixture(autouse=True)
def no_folders(monkeypatch, tmp_path):
    """Neither the user's folders nor the network are touched by these tests."""
    monkeypatch.delenv("HSPSAM_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def refuse(*_args, **_options):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


# -- finding


def test_locate_looks_in_order(tmp_path, monkeypatch):
    cache, named = tmp_path / "cache" / "hspsam", tmp_path / "named"
    for folder in (cache, named):
        folder.mkdir(parents=True)
        (folder / "mobile_sam.pt").write_bytes(b"x")
    explicit = tmp_path / "mine.pt"
    explicit.write_bytes(b"x")
    assert locate(explicit) == explicit
    assert locate("mobile_sam") == cache / "mobile_sam.pt"
    monkeypatch.setenv("HSPSAM_WEIGHTS", str(named))
    assert locate("mobile_sam") == named / "mobile_sam.pt"
    assert locate("mobile_sam.pt") == named / "mobile_sam.pt"


def test_locate_says_where_it_looked_and_what_to_do(tmp_path):
    with pytest.raises(WeightsError, match=r"looked for .*sam_vit_b_01ec64.pth.*hspsam weights fetch sam_vit_b"):
        locate("sam_vit_b")
    with pytest.raises(WeightsError, match="neither a file nor one of sam_vit_b"):
        locate(tmp_path / "none.pth")


def test_catalogue_is_consistent():
    for name, entry in CATALOGUE.items():
        assert entry.name == name and entry.url.startswith("https://")
        assert entry.sha256 is None or len(bytes.fromhex(entry.sha256)) == 32
    assert CATALOGUE["sam_vit_l"].file_name == "sam_vit_l_0b3195.pth"


# -- hashes and fetching


def test_wrong_hash_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "sam_vit_b_01ec64.pth"
    path.write_bytes(b"other")
    with pytest.raises(WeightsError, match="expected ec2df627"):
        verify(path)
    monkeypatch.setenv("HSPSAM_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError, match="expected ec2df627"):
        locate_verified("sam_vit_b")
    assert locate_verified(path) == path  # the user's own choice


def test_verify_without_known_hash_says_so(tmp_path):
    path = tmp_path / "mine.pth"
    path.write_bytes(b"abc")
    found = verify(path)
    assert not found.verified and found.sha256 == hashlib.sha256(b"abc").hexdigest()
    assert verify(path, found.sha256).verified
    with pytest.raises(WeightsError, match="expected 00"):
        verify(path, sha256="00" * 32)


class Response(io.BytesIO):
    """What urlopen returns, cut short."""

    def __init__(self, content):
        super().__init__(content)
        self.headers = {"Content-Length": str(len(content))}


def serve(monkeypatch, content):
    calls = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, **_: calls.append(url) or Response(content))
    return calls


def test_fetch_keeps_only_the_right_file(tmp_path, monkeypatch):
    right = hashlib.sha256(b"weights").hexdigest()
    with pytest.raises(WeightsError, match=r"No sha256 is known.*--sha256"):
        fetch("medsam", tmp_path)
    serve(monkeypatch, b"something else")
    with pytest.raises(WeightsError, match=f"expected {right}"):
        fetch("medsam", tmp_path, sha256=right)
    assert list(tmp_path.iterdir()) == []
    calls, progress = serve(monkeypatch, b"weights"), []
    path = fetch("medsam", tmp_path, lambda *step: progress.append(step), right.upper())
    assert path.read_bytes() == b"weights" and progress == [(7, 7)]
    assert fetch("medsam", tmp_path, sha256=right) == path and len(calls) == 1  # already there
    with pytest.raises(WeightsError, match=r"The catalogue knows mobile_sam\.pt by sha256"):
        fetch("mobile_sam", tmp_path, sha256=right)


def test_a_connection_that_ends_early_is_no_wrong_file(tmp_path, monkeypatch):
    response = Response(b"weights")
    response.headers["Content-Length"] = "1000"
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, **_: response)
    with pytest.raises(WeightsError, match=r"the connection ended after 7 of 1000 bytes.*Try again"):
        fetch("medsam", tmp_path, sha256="00" * 32)
    assert list(tmp_path.iterdir()) == []


def test_fetch_without_connection_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"could not be fetched from https://dl.*no network"):
        fetch("sam_vit_b", tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WeightsError, match="not in the catalogue"):
        fetch("nonsense", tmp_path)


# -- the real file


@pytest.mark.data
def test_mobile_sam_is_found_and_verified(shared, monkeypatch):
    monkeypatch.setenv("HSPSAM_WEIGHTS", str(shared / "weights"))
    found = verify("mobile_sam")
    assert found.path == shared / "weights" / "mobile_sam.pt" and found.verified
    assert len(read_state(found.path)) == 439
    assert catalogue.search_folders()[0] == shared / "weights"
