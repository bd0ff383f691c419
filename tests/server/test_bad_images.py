"""Images as strangers send them: whatever they are, a sentence or an answer, and the server goes on."""

from __future__ import annotations

import struct
import zlib

import httpx
import psutil
import pytest
from PIL import Image

from promprune_vllm.demo import photo_path
from promprune_vllm.demo.server import Server
from tests.server.conftest import ask, body, data_url, image_url, post, saved

pytestmark = pytest.mark.server
CHAT = "/v1/chat/completions"
MIB = 2**20


def bomb(width: int, height: int) -> bytes:
    """A black PNG with one bit a pixel: 400 million of them in 50 kilobytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    squeeze, row = zlib.compressobj(9), bytes(1 + (width + 7) // 8)
    data = b"".join(squeeze.compress(row) for _ in range(height)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def memory(server: Server) -> int:
    first = psutil.Process(server.process.pid)
    return sum(each.memory_info().rss for each in (first, *first.children(recursive=True)))


FRAMES = [Image.new("RGB", (64, 48), colour) for colour in ("red", "green", "blue")]
ODD = {
    "one pixel": saved(Image.new("RGB", (1, 1)), "PNG"),
    "one row": saved(Image.new("RGB", (20_000, 1), "red"), "PNG"),
    "one column": saved(Image.new("RGB", (1, 20_000), "red"), "PNG"),
    "grey": saved(Image.new("L", (80, 60), 90), "PNG"),
    "16 bit": saved(Image.new("I;16", (80, 60), 9000), "PNG"),
    "palette with a see-through colour": saved(Image.new("P", (80, 60)), "GIF", transparency=0),
    "CMYK": saved(Image.new("CMYK", (80, 60)), "JPEG"),
    "see-through": saved(Image.new("RGBA", (80, 60), (9, 9, 9, 9)), "WEBP"),
    "animated GIF": saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "animated WebP": saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]),
    "BMP": saved(FRAMES[0], "BMP"),
    "TIFF": saved(FRAMES[0], "TIFF"),
    "told to be of another kind": image_url("coffee").replace("image/jpeg", "image/png"),
}
BAD = {
    "half a file": data_url(photo_path("coffee").read_bytes()[:9000], "jpeg"),
    "no bytes": "data:image/png;base64,",
    "text": data_url(b"This is not an image."),
    "a script in SVG": data_url(b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>", "svg+xml"),
    "PostScript": data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage", "eps"),
    "broken base64": "data:image/png;base64,%%%%",
    "a PNG with a wrong length": data_url(b"\x89PNG\r\n\x1a\n" + b"\xff" * 64),
    "a bomb": data_url(bomb(20_000, 20_000)),
    "a tall bomb": data_url(bomb(9, 60_000_000 // 2)),
    "a file of the server": "file:///etc/passwd",
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_image_is_answered_with_the_budget(server: Server, name: str) -> None:
    usage = ask(server, ODD[name], visual_token_budget=20)["usage"]
    assert usage["visual_tokens"]["kept"] == 20


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_refused_in_a_sentence_before_the_encoder(server: Server, name: str) -> None:
    encoded, before = server.metrics("promprune_encoder"), memory(server)
    response = post(server, CHAT, body(BAD[name], visual_token_budget=20))
    assert response.status_code == 400, response.text[:300]
    message = response.json()["error"]["message"]
    assert message
    assert "Traceback" not in message
    assert server.metrics("promprune_encoder") == encoded
    assert memory(server) - before < 300 * MIB
    assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200


def test_three_hundred_images_are_one_request_or_one_sentence(server: Server) -> None:
    many = ["coffee"] * 300
    usage = ask(server, *many, visual_token_budget=1)["usage"]  # as much of the context as half an image
    assert usage["visual_tokens"]["kept"] == 300
    response = post(server, CHAT, body(*many))
    assert response.status_code == 400
    assert "2048" in response.json()["error"]["message"]


def test_more_budgets_than_images_are_refused(server: Server) -> None:
    response = post(server, CHAT, body("coffee", visual_token_budget=[64] * 100))
    assert response.status_code == 400
    assert "100" in response.json()["error"]["message"]
