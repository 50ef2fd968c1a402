"""Gradients at a size that half precision can hold: every segment is scaled by a power of two, and its sketch back.

The weights of a policy gradient are small: ``A / (K * tokens)`` is 1e-4 for 8 responses of 1000 tokens, and the
gradient of a logit is often a thousandth of it. float16 has no numbers below 6e-8 and few bits below 6e-5: a pass in
float16 would silently lose most of a long response. A gradient is linear in its weights, so each segment runs
with weights of about 1, and with hidden gradients of about 1 from the decoder's end on; its sketch is multiplied by
what was divided out. Powers of two change no bit of other numbers (float32, bfloat16) unless they would underflow, too.
"""

from __future__ import annotations

import torch

from ...ops.linear_logprob.contract import Weigh


class SegmentScales:
    """A power of two for each segment: what its weights and gradients have been divided by so far.

    Args:
        offsets: int64 [segments + 1], the range of scored tokens of each segment, on the device of their weights.
        segment: int64 [n], the segment of each of them.
    """

    def __init__(self, offsets: torch.Tensor, segment: torch.Tensor) -> None:
        self.count, self.offsets, self.segment = offsets.numel() - 1, offsets, segment

    def weigh(self, given: Weigh) -> Weigh:
        """``given`` with weights of about 1: in [1/2, 1) is the largest of those that a segment shows first.

        A segment that goes on in a later chunk keeps its power of two: its sketch is one sum.
        """
        # Not before the forward pass, for which a device waits meanwhile.
        self.exponent = torch.zeros(self.count, dtype=torch.int32, device=self.offsets.device)
        self._weighed = torch.zeros(self.count, dtype=torch.bool, device=self.offsets.device)

        def scaled(logprobs: torch.Tensor, start: int, stop: int) -> torch.Tensor:
            weights = given(logprobs, start, stop)
            if not isinstance(weights, torch.Tensor) or tuple(weights.shape) != (stop - start,):
                return weights  # the caller of this says what is wrong with them
            weights = weights.to(self.segment.device, logprobs.dtype)
            segment = self.segment[start:stop]
            exponents = self._exponents(weights, segment)
            new = ~self._weighed & (exponents != 0)
            self.exponent = torch.where(new, exponents, self.exponent)
            self._weighed |= new
            return _times_power(weights, -self.exponent[segment])

        return scaled

    def unscaled(self, weights: torch.Tensor) -> torch.Tensor:
        """The weights that were given, from those that `weigh` made of them. Before `normalise`."""
        return _times_power(weights, self.exponent[self.segment])

    def normalise(self, rows: torch.Tensor, *sketches: torch.Tensor) -> torch.Tensor:
        """``rows`` [tokens, n], a gradient for each scored token, with entries up to 1 in each segment.

        ``sketches`` [segments, dim], what the head has added, are divided in place by the same powers of two.
        """
        exponents = self._exponents(rows.abs().amax(dim=1), self.segment)
        self.exponent = self.exponent + exponents
        for each in sketches:
            _scale_by_power(each, -exponents[:, None])
        return _times_power(rows, -exponents[self.segment][:, None])

    def restore(self, sketches: torch.Tensor) -> None:
        """Multiply the sketches [segments, dim] in place by all that was divided out."""
        _scale_by_power(sketches, self.exponent[:, None])

    def _exponents(self, values: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
        """e of each segment's largest size, 2^(e - 1) <= size < 2^e; 0 for an empty segment and for NaN or infinity."""
        dtype = torch.promote_types(values.dtype, torch.float32)
        largest = torch.zeros(self.count, dtype=dtype, device=values.device)
        largest.scatter_reduce_(0, segment, values.abs().to(largest.dtype), "amax")
        return torch.where(largest.isfinite(), torch.frexp(largest).exponent, 0)


def _times_power(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """``x * 2^exponent``, in two steps: 2^exponent itself may be beyond the dtype where the product is not."""
    return _scale_by_power(x.clone(), exponent)


def _scale_by_power(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    half = exponent // 2
    return x.mul_(_power_of_two(half, x.dtype)).mul_(_power_of_two(exponent - half, x.dtype))


def _power_of_two(exponent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """2^exponent by its bits: a device's pow and exp2 may be off by one in the last place."""
    if dtype == torch.float64:
        return (exponent.long().clamp(-1022, 1023) + 1023).bitwise_left_shift(52).view(torch.float64)
    return (exponent.int().clamp(-126, 127) + 127).bitwise_left_shift(23).view(torch.float32).to(dtype)
