"""Operations of a denoiser call, by counting tokens."""

from typing import NamedTuple

from dype.families import TOKEN


class Architecture(NamedTuple):
    """A transformer whose blocks all attend over text and picture together."""

    width: int  # D
    blocks: int
    per_token: int  # parameters of a block's linear layers that one token meets, in D^2
    text: int  # tokens

    def flop(self, height: int, width: int) -> float:
        """Of one denoiser call at `height` x `width` px, in linear layers and in attention.

        2 blocks per_token D^2 S and 4 blocks D S^2, S the tokens of picture (px / 16) and text.
        """
        tokens = height * width / TOKEN**2 + self.text
        linear = 2 * self.blocks * self.per_token * self.width**2 * tokens
        return linear + 4 * self.blocks * self.width * tokens**2


ARCHITECTURES = {  # by the names of catalog.MODELS
    "flux-krea": Architecture(3072, 57, 12, 512),
    "z-image-turbo": Architecture(3840, 32, 12, 512),
}
