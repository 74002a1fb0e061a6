"""The table of real models: how each is built, small and random, what it is fed, who puts its norms there."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelCase:
    """One row: a model of a public library."""

    name: str
    package: str
    api: Literal["parametrize", "legacy"]
    build: Callable[[], nn.Module]
    inputs: dict[str, Any]


def tensors(output: object) -> list[Tensor]:
    """Collect every tensor of a model's output, whatever container the library chose."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in tensors(value)]
    if isinstance(output, (list, tuple)):
        return [tensor for value in output for tensor in tensors(value)]
    return []


@contextmanager
def stubbed(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Put modules in ``sys.modules`` while a library is imported, and take them out again.

    torchaudio has no release for the torch under test, and audiotools needs it. The libraries below import
    them to read and resample audio files; the models are torch alone, and no part of one is ever replaced.
    """
    absent = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(absent)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def _stub(name: str, **attributes: object) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    return module


def _audiotools() -> ModuleType:
    """Stand in for audiotools, with its own BaseModel, the base class of the codec, loaded from its file."""
    package = importlib.util.find_spec("audiotools")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = f"{package.submodule_search_locations[0]}/ml/layers/base.py"
    spec = importlib.util.spec_from_file_location("audiotools_base_model", path)
    assert spec is not None
    assert spec.loader is not None
    base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(base)
    # Names for annotations and `isinstance` only.
    signal = type("AudioSignal", (), {})
    models = _stub("audiotools.ml", BaseModel=base.BaseModel)
    return _stub("audiotools", AudioSignal=signal, STFTParams=signal, ml=models)


def _normed(model: Any) -> nn.Module:
    """Put the norms on a class that is built without them, as its training code does."""
    model.apply_weight_norm()
    return model


SPEECH = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8, 8),
    "conv_stride": (4, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
HIFIGAN = {
    "model_in_dim": 8,
    "upsample_initial_channel": 16,
    "upsample_rates": [4, 4],
    "upsample_kernel_sizes": [8, 8],
    "resblock_kernel_sizes": [3, 5],
    "resblock_dilation_sizes": [[1, 3], [1, 3]],
}
DAC = {
    "encoder_hidden_size": 4,
    "downsampling_ratios": [4, 2],
    "decoder_hidden_size": 16,
    "upsampling_ratios": [4, 2],
    "hidden_size": 16,
    "n_codebooks": 2,
    "codebook_size": 16,
    "codebook_dim": 4,
}
SEANET = {"channels": 1, "dimension": 8, "n_filters": 4, "ratios": [4, 2], "causal": True}


def _wav2vec2() -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    return Wav2Vec2Model(Wav2Vec2Config(**SPEECH))


def _hubert() -> nn.Module:
    from transformers import HubertConfig, HubertModel

    return HubertModel(HubertConfig(**SPEECH))


def _wavlm() -> nn.Module:
    from transformers import WavLMConfig, WavLMModel

    return WavLMModel(WavLMConfig(**SPEECH))


def _sew() -> nn.Module:
    from transformers import SEWConfig, SEWModel

    return SEWModel(SEWConfig(**SPEECH))


def _speecht5_hifigan() -> nn.Module:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    return _normed(SpeechT5HifiGan(SpeechT5HifiGanConfig(**HIFIGAN)))


def _fastspeech2() -> nn.Module:
    from transformers import FastSpeech2ConformerHifiGan, FastSpeech2ConformerHifiGanConfig

    return _normed(FastSpeech2ConformerHifiGan(FastSpeech2ConformerHifiGanConfig(**HIFIGAN)))


def _univnet() -> nn.Module:
    from transformers import UnivNetConfig, UnivNetModel

    config = UnivNetConfig(
        model_in_channels=8,
        model_hidden_channels=4,
        num_mel_bins=8,
        resblock_kernel_sizes=[3, 3],
        resblock_stride_sizes=[4, 4],
        resblock_dilation_sizes=[[1, 3], [1, 3]],
        kernel_predictor_num_blocks=1,
        kernel_predictor_hidden_channels=8,
    )
    return _normed(UnivNetModel(config))


def _dac() -> nn.Module:
    from transformers import DacConfig, DacModel

    return _normed(DacModel(DacConfig(**DAC)))


def _vits() -> nn.Module:
    from transformers import VitsConfig, VitsModel

    config = VitsConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        ffn_dim=8,
        flow_size=8,
        spectrogram_bins=9,
        layerdrop=0.0,
        upsample_initial_channel=16,
        upsample_rates=[4, 4],
        upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        duration_predictor_num_flows=2,
        duration_predictor_filter_channels=8,
        prior_encoder_num_flows=2,
        prior_encoder_num_wavenet_layers=2,
        posterior_encoder_num_wavenet_layers=2,
        num_speakers=2,
        speaker_embedding_size=4,
    )
    model = VitsModel(config)
    _normed(model.decoder)
    return model


def _encodec() -> nn.Module:
    from transformers import EncodecConfig, EncodecModel

    config = EncodecConfig(
        target_bandwidths=[12.0],
        hidden_size=8,
        num_filters=4,
        upsampling_ratios=[4, 2],
        num_lstm_layers=1,
        codebook_size=16,
    )
    return EncodecModel(config)


def _xcodec() -> nn.Module:
    from transformers import DacConfig, HubertConfig, XcodecConfig, XcodecModel

    config = XcodecConfig(
        target_bandwidths=[16],
        codebook_size=16,
        acoustic_model_config=DacConfig(**DAC),
        # Kernels that leave as many frames as the acoustic encoder does.
        semantic_model_config=HubertConfig(**SPEECH | {"conv_kernel": (8, 2)}),
    )
    return _normed(XcodecModel(config))


def _oobleck() -> nn.Module:
    from diffusers import AutoencoderOobleck

    return AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=2,
    )


def _meta_encodec() -> nn.Module:
    with stubbed({"torchaudio": _stub("torchaudio")}):
        from encodec.model import EncodecModel
        from encodec.modules import SEANetDecoder, SEANetEncoder
        from encodec.quantization import ResidualVectorQuantizer

    encoder = SEANetEncoder(norm="weight_norm", **SEANET)
    decoder = SEANetDecoder(norm="weight_norm", **SEANET)
    quantizer = ResidualVectorQuantizer(dimension=8, n_q=2, bins=16)
    return EncodecModel(encoder, decoder, quantizer, [24.0], sample_rate=24000, channels=1)


def _meta_encodec_spectral() -> nn.Module:
    """Build Encodec's encoder with its other norm: the old spectral norm in a real model."""
    with stubbed({"torchaudio": _stub("torchaudio")}):
        from encodec.modules import SEANetEncoder

    return SEANetEncoder(norm="spectral_norm", **SEANET)


def _descript_dac() -> nn.Module:
    audiotools = _audiotools()
    # dac.utils downloads weights and parses command lines; it wants the rest of audiotools.
    absent = {"audiotools": audiotools, "audiotools.ml": audiotools.ml, "dac.utils": _stub("dac.utils")}
    with stubbed(absent):
        import dac.model.dac as descript

    return descript.DAC(
        encoder_dim=4,
        encoder_rates=[2, 4],
        latent_dim=16,
        decoder_dim=16,
        decoder_rates=[4, 2],
        n_codebooks=2,
        codebook_size=16,
        codebook_dim=4,
    )


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


MEL = _noise(1, 12, 8)
TEXT = torch.arange(1, 9)[None]
WAVE = _noise(1, 640)

CASES = (
    ModelCase("wav2vec2", "transformers", "parametrize", _wav2vec2, {"input_values": WAVE}),
    ModelCase("hubert", "transformers", "parametrize", _hubert, {"input_values": WAVE}),
    ModelCase("wavlm", "transformers", "parametrize", _wavlm, {"input_values": WAVE}),
    ModelCase("sew", "transformers", "parametrize", _sew, {"input_values": WAVE}),
    ModelCase("speecht5-hifigan", "transformers", "parametrize", _speecht5_hifigan, {"spectrogram": MEL}),
    ModelCase("fastspeech2-hifigan", "transformers", "parametrize", _fastspeech2, {"spectrogram": MEL}),
    ModelCase("univnet", "transformers", "parametrize", _univnet, {"input_features": MEL}),
    ModelCase("dac", "transformers", "parametrize", _dac, {"input_values": WAVE[None]}),
    ModelCase("vits", "transformers", "parametrize", _vits, {"input_ids": TEXT, "speaker_id": 1}),
    ModelCase("encodec", "transformers", "parametrize", _encodec, {"input_values": WAVE[None]}),
    ModelCase("xcodec", "transformers", "parametrize", _xcodec, {"input_values": WAVE[None]}),
    ModelCase("oobleck", "diffusers", "legacy", _oobleck, {"sample": WAVE.expand(1, 2, -1)}),
    ModelCase("meta-encodec", "encodec", "legacy", _meta_encodec, {"x": WAVE[None]}),
    ModelCase("meta-encodec-spectral", "encodec", "legacy", _meta_encodec_spectral, {"x": WAVE[None]}),
    ModelCase("descript-dac", "dac", "legacy", _descript_dac, {"audio_data": WAVE[None]}),
)
