"""The player as an object: what it sends to the browser, and what stands there without widgets."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from traitlets import TraitError

import vblklab as vb
from vblklab.view import ring_player
from vblklab.view.ring_player import RingPlayer


@pytest.fixture(scope="module")
def film() -> vb.Film:
    app = vb.Fio(rw="randread", bs=4096, iodepth=2, number_ios=10)
    return vb.film(vb.Pipeline(app=app, queue=vb.Split(8)).boot(vb.SimMachine()), steps=2000)


def test_every_frame_is_a_picture_of_one_size(film: vb.Film) -> None:
    player = film.player()
    assert len(player.frames) == len(player.labels) == len(film)
    assert len({ElementTree.fromstring(frame).get("height") for frame in player.frames}) == 1
    assert player.labels[2] == "frame 2: virtqueue_kick_prepare, avail.idx=1"


def test_a_frame_can_be_set_and_must_be_there(film: vb.Film) -> None:
    player = film.player(start=3)
    assert player.frame == 3
    player.frame = 5
    for number in (len(film), -1):
        with pytest.raises((vb.ConfigError, TraitError)):
            player.frame = number
    assert player.frame == 5
    with pytest.raises(vb.ConfigError, match="frames 0 to"):
        film.player(start=len(film))


def test_without_widgets_there_are_pictures_and_text(film: vb.Film) -> None:
    bundle = film._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/html"].count("<svg") == 4 and "more frames" in bundle["text/html"]
    assert "virtqueue_kick_prepare" in bundle["text/plain"]


def test_a_long_film_is_sent_in_part(film: vb.Film, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_player, "MOST_FRAMES", 5)
    player = RingPlayer(film, 7)
    assert (len(player.frames), player.first, player.frame, player.count) == (5, 7, 0, len(film))
