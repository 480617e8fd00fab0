"""Makes the speech of the quickstart: ``python data/quickstart/make_corpus.py`` (needs espeak-ng, soundfile, soxr).

Every utterance is a sentence that no other utterance says. Voices are variants of espeak-ng, each with all the
accents; a voice belongs to one split, so that the validation and test splits hold sentences and voices that training
never meets. The same espeak-ng gives the same files, byte for byte (1.51 made those that are here).

Writes ``audio/*.opus`` (Ogg Opus, 16 kHz, mono) and ``metadata.csv``.
"""

import csv
import io
import itertools
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import soundfile
import soxr
from sentences import Deck, sentences

HERE = Path(__file__).parent
RATE = 16_000
SEED = 20
UTTERANCES = {"train": 960, "validation": 40, "test": 120}

ACCENTS = ["en-us", "en-us-nyc", "en-gb", "en-gb-x-rp"]
#: Voices by split. Variants of one voice are joined by commas: they do not appear in two splits.
VOICES = {
    "train": """m1 m3 m4 m7 m8 f1 f2 f4 Alex Andrea Andy Annie Denis Diogo Gene,Gene2 Henrique Hugo Jacky Lee Marco
        Mario Nguyen adam anika antonio aunty belinda boris caleb david ed edward,edward2 grandma gustave
        iven,iven2,iven3 john kaukovalta klatt,klatt2,klatt3 shelby marcelo max michel miguel norbert pablo paul pedro
        rob robert sandro steph,steph2,steph3 travis zac""",
    "validation": "m2 f3 benjamin Alicia",
    "test": "m5 m6 f5 Michael Mike grandpa quincy linda victor",
}

PADDING_SECONDS = 0.08
#: 0 is best, 1 smallest; this is about 10 kbit/s.
COMPRESSION = 0.987
OGG_SERIAL = 1
VENDOR = b"libopus"


def main() -> None:
    shutil.rmtree(HERE / "audio", ignore_errors=True)
    rows = list(speak_all())
    with (HERE / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    size = sum(path.stat().st_size for path in (HERE / "audio").rglob("*.opus"))
    hours = sum(float(row["seconds"]) for row in rows) / 3600
    print(f"{len(rows)} utterances, {hours:.2f} h, {size / 1e6:.2f} MB")


def speak_all():
    """Synthesises all splits; yields the rows of ``metadata.csv``."""
    told = sentences(SEED)
    for split, families in VOICES.items():
        (HERE / "audio" / split).mkdir(parents=True)
        chance = random.Random(f"{SEED} {split}")
        voices = Deck([voice for family in families.split() for voice in family.split(",")], chance)
        accents = Deck(ACCENTS, chance)
        for number, sentence in enumerate(itertools.islice(told, UTTERANCES[split])):
            voice = f"{accents.deal()}+{voices.deal()}"
            speed, pitch = chance.randint(145, 195), chance.randint(30, 70)
            waveform = speak(sentence, voice, speed, pitch)
            name = f"audio/{split}/{number:04d}.opus"
            (HERE / name).write_bytes(encode(waveform))
            yield {
                "split": split,
                "file_name": name,
                "text": sentence,
                "voice": voice,
                "words_per_minute": speed,
                "pitch": pitch,
                "seconds": f"{len(waveform) / RATE:.3f}",
            }


def speak(sentence: str, voice: str, words_per_minute: int, pitch: int) -> np.ndarray:
    """The sentence at 16 kHz, with a little silence at both ends."""
    command = ["espeak-ng", "--stdout", "-v", voice, "-s", str(words_per_minute), "-p", str(pitch), sentence]
    wave = subprocess.run(command, capture_output=True, check=True).stdout
    waveform, rate = soundfile.read(io.BytesIO(wave), dtype="float32")
    waveform = soxr.resample(waveform, rate, RATE)
    loud = np.flatnonzero(np.abs(waveform) > 0.01 * np.abs(waveform).max())
    padding = round(PADDING_SECONDS * RATE)
    waveform = np.pad(waveform[loud[0] : loud[-1] + 1], padding)
    return 0.5 * waveform / np.abs(waveform).max()


def encode(waveform: np.ndarray) -> bytes:
    """Ogg Opus (RFC 7845) without what the encoder adds: a random stream number, and 0.7 kB of empty comments."""
    file = io.BytesIO()
    soundfile.write(file, waveform, RATE, format="OGG", subtype="OPUS", compression_level=COMPRESSION)
    rest, pages = file.getvalue(), []
    while rest:
        header = 27 + rest[26]
        end = header + sum(rest[27:header])
        pages.append((rest[:header], rest[header:end]))
        rest = rest[end:]
    comments = b"OpusTags" + len(VENDOR).to_bytes(4, "little") + VENDOR + bytes(4)
    pages[1] = (pages[1][0][:26] + bytes([1, len(comments)]), comments)
    return b"".join(ogg_page(header, content) for header, content in pages)


def ogg_page(header: bytes, content: bytes) -> bytes:
    """A page with our stream number and its checksum."""
    start, segments = header[:14] + OGG_SERIAL.to_bytes(4, "little") + header[18:22], header[26:]
    checksum = ogg_checksum(start + bytes(4) + segments + content)
    return start + checksum.to_bytes(4, "little") + segments + content


def ogg_checksum(page: bytes) -> int:
    """CRC-32 of an Ogg page (RFC 3533, section 6): polynomial 0x04c11db7, most significant bit first, from 0."""
    remainder = 0
    for byte in page:
        remainder = (remainder << 8 & 0xFFFFFFFF) ^ CRC_TABLE[remainder >> 24 ^ byte]
    return remainder


def _crc_of_byte(byte: int) -> int:
    remainder = byte << 24
    for _ in range(8):
        remainder = (remainder << 1 ^ (0x04C11DB7 if remainder >> 31 else 0)) & 0xFFFFFFFF
    return remainder


CRC_TABLE = [_crc_of_byte(byte) for byte in range(256)]


if __name__ == "__main__":
    main()
