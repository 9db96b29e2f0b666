"""
Text to speech, for questions and facts that exist only as text.

What this file teaches: how to get a hundred different voices out of one 21 MB wheel (espeak-ng, through ctypes, about
20 ms for a sentence), with the four knobs of prosody that mini_world.py builds its emotions from: rate, pitch, range and loudness.

    python speak.py "seven plus two minus four" sum.wav --voice f2 --rate 200
"""
import argparse
import ctypes
import os
import tempfile
from functools import cache

import espeakng_loader
import numpy as np
import soundfile
import torch
import torchaudio

SAMPLE_RATE = 16_000            # what every audio tower in the project hears
ESPEAK_RATE, ESPEAK_VOLUME, ESPEAK_PITCH, ESPEAK_RANGE = 1, 2, 3, 4      # espeak_PARAMETER in speak_lib.h
RETRIEVAL, POS_CHARACTER, CHARS_UTF8 = 1, 1, 1                           # AUDIO_OUTPUT_RETRIEVAL, POS_CHARACTER, espeakCHARS_UTF8
SYNTH_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@cache
def espeak():
    """The library, initialised once per process -> (ctypes library, its sampling rate in Hz, the list its callback fills)."""
    data_path = espeakng_loader.get_data_path()
    if len(data_path) > 140:    # espeak-ng keeps this path in 160 bytes and falls silent when it does not fit
        link = os.path.join(tempfile.mkdtemp(), "data")
        os.symlink(data_path, link)
        data_path = link
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(RETRIEVAL, 0, data_path.encode(), 0)
    if rate <= 0:
        raise RuntimeError(f"espeak-ng did not start from {data_path}; reinstall it with `pip install --force-reinstall espeakng-loader`")
    chunks = []

    @SYNTH_CALLBACK
    def receive(samples, count, _events):
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(receive)
    library.receive = receive   # keep the callback alive as long as the library
    return library, rate, chunks


def speak(text, *, voice="m3", accent="en-us", rate=190, pitch=50, pitch_range=50, volume=100):
    """
    Speak one sentence.

    voice: an espeak-ng variant (m1..m8, f1..f5, or a name such as "Andy"); accent: its language; rate: words per minute (80 to 450);
    pitch and pitch_range: 0 to 100, 50 is the voice's own; volume: per cent. espeak-ng keeps state between sentences: the same arguments
    give the same samples only at the same place in a fresh process's sequence of calls.
    Returns float32 [samples] at 16 kHz, without leading and trailing silence. Raises ValueError for an unknown voice or silent text.
    """
    library, sample_rate, chunks = espeak()
    if library.espeak_SetVoiceByName(f"{accent}+{voice}".encode()) != 0:
        raise ValueError(f"espeak-ng has no voice {accent}+{voice}; use a variant such as m1..m8 or f1..f5 with an accent such as en-us")
    for parameter, value in ((ESPEAK_RATE, rate), (ESPEAK_PITCH, pitch), (ESPEAK_RANGE, pitch_range), (ESPEAK_VOLUME, volume)):
        library.espeak_SetParameter(parameter, int(value), 0)
    chunks.clear()
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))         # the breath of f2 and f3 is noise, and espeak-ng seeds it with the clock
    encoded = text.encode()
    library.espeak_Synth(encoded, len(encoded) + 1, 0, POS_CHARACTER, 0, CHARS_UTF8, None, None)
    library.espeak_Synchronize()
    if not chunks or not np.concatenate(chunks).any():
        raise ValueError(f"nothing to hear in {text!r}; give text with words in it")
    waveform = torch.from_numpy(np.concatenate(chunks).astype(np.float32) / 32768)
    waveform = torchaudio.functional.resample(waveform, sample_rate, SAMPLE_RATE)
    loud = (waveform.abs() > 0.002).nonzero()[:, 0]
    return waveform[loud[0]:loud[-1] + 1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("text")
    parser.add_argument("out", help="the WAV file to write (16 kHz, mono, 16 bit)")
    parser.add_argument("--voice", default="m3", help="espeak-ng variant: m1..m8, f1..f5, or a name")
    parser.add_argument("--accent", default="en-us", help="espeak-ng language: en-us, en-gb-x-rp, en-gb-scotland, ...")
    parser.add_argument("--rate", type=int, default=190, help="words per minute")
    parser.add_argument("--pitch", type=int, default=50, help="0 to 100")
    args = parser.parse_args()
    soundfile.write(args.out, speak(args.text, voice=args.voice, accent=args.accent, rate=args.rate, pitch=args.pitch).numpy(), SAMPLE_RATE)


if __name__ == "__main__":
    main()
