"""Modules without a weight of their own, which compute with that of a compressed layer, their home."""

from torch import Tensor, nn

from hf_lossless.storage.layers import LayerKind
from hf_lossless.storage.modules.base import CompressedModule


class Tied(nn.Module):
    """Base of the modules without a weight of their own.

    The home is referred to without being registered, so that its tensors are saved and moved once. A deep copy of the
    model copies both, and the copied module refers to the copied home.
    """

    def __init__(self, home: CompressedModule, bias: nn.Parameter | None) -> None:
        super().__init__()
        object.__setattr__(self, "home", home)
        self.register_parameter("bias", bias)
        self.training = home.training

    home: CompressedModule
    bias: nn.Parameter | None

    @property
    def weight(self) -> Tensor:
        """Rebuilds the home's weight, at each access."""
        return self.home.weight


class TiedLinear(Tied):
    """A linear layer with the weight of a compressed embedding (or of another linear layer)."""

    def __init__(self, home: CompressedModule, bias: nn.Parameter | None) -> None:
        super().__init__(home, bias)
        self.out_features, self.in_features = home.matrix_shape

    def forward(self, input: Tensor) -> Tensor:
        """Computes y = x W' + b; with a low-rank home, y = (x R') L' + b."""
        return self.home.linear_now(input, self.bias)


class TiedEmbedding(Tied):
    """An embedding with the weight of another compressed embedding (or of a linear layer)."""

    def __init__(self, home: CompressedModule, bias: nn.Parameter | None) -> None:
        super().__init__(home, bias)
        self.num_embeddings, self.embedding_dim = home.matrix_shape
        self.padding_idx = getattr(home, "padding_idx", None)

    def forward(self, input: Tensor) -> Tensor:
        """Looks up the rows of the home's weight at `input`."""
        return self.home.embedding(input)


TIED: dict[LayerKind, type[Tied]] = {"linear": TiedLinear, "embedding": TiedEmbedding}
