"""Forward passes of layers that are stored as one matrix, packed or coded, to be mixed into `CompressedModule`s."""

from torch import Tensor
from torch.nn import functional as F

from hf_lossless.modules.base import CompressedModule


class WholeLinear(CompressedModule):
    """nn.Linear, or transformers' Conv1D, whose weight is [in, out]."""

    def forward(self, input: Tensor) -> Tensor:
        """Computes y = x W' + b."""
        return self.linear(self.quantised(input), self.bias)


class WholeConv2d(CompressedModule):
    """nn.Conv2d, grouped and depthwise too."""

    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int

    def forward(self, input: Tensor) -> Tensor:
        """The convolution with the kernel made now."""
        input, kernel = self.quantised(input), self.matrix().view(self.weight_shape)
        return F.conv2d(input, kernel, self.bias, self.stride, self.padding, self.dilation, self.groups)


class WholeEmbedding(CompressedModule):
    """nn.Embedding; makes only the rows that it looks up."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the weight at `input`."""
        return self.embedding(input)
