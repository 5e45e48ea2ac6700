"""`python -m training` makes the model from nothing; killed and started again, it goes on.

`python -m training export` writes the model folder from the latest checkpoint of the denoiser.
"""

import sys

from training import corpus, denoiser, detector, safety_checker, text_encoder, tokenizer, vae
from training.common import MODEL
from training.export import export
from worker import self_test


def main() -> None:
    """Run the stages in order; finished ones return at once."""
    corpus.font()  # a missing one is better known now than after the first stage
    words = tokenizer.build()
    encoder = text_encoder.train(words)
    autoencoder = vae.train()
    checker = safety_checker.train(autoencoder)
    detector.train(autoencoder)
    if sys.argv[1:] == ["export"]:
        unet = denoiser.latest()
    else:
        unet = denoiser.train(words, encoder, autoencoder)
    export(words, encoder, autoencoder, unet, checker)
    self_test.write(MODEL)


if __name__ == "__main__":
    main()
