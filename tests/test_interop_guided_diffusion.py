"""Checkpoints of guided- and improved-diffusion as diffusions: cards, weights, and files that are none."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import zipfile
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

import pyrodiff
from pyrodiff import GaussianDiffusion
from pyrodiff.errors import CheckpointError, OptionError
from pyrodiff.interop import guided_diffusion as interop
from pyrodiff.interop.cards import CARDS, CLASSIFIERS, Card, ClassifierCard
from pyrodiff.nets import UNet

DATA = pathlib.Path(__file__).parent / "data"

# The flags of the two READMEs, word for word, and the parameters and tensors of the networks that their scripts then build.
ADM = (
    "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size {} --learn_sigma True "
    "--noise_schedule linear --num_channels 256 {} --num_res_blocks 2 --resblock_updown True --use_fp16 True "
    "--use_scale_shift_norm True"
)
LSUN = (
    "--attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 --dropout 0.1 --image_size 256 "
    "--learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_fp16 True --use_scale_shift_norm True"
)
IMAGENET = (
    "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True --diffusion_steps 4000 "
    "--noise_schedule cosine"
)
CIFAR = (
    "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3 --diffusion_steps 4000 "
    "--noise_schedule cosine"
)
OLD_LSUN = (
    "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
    "--use_scale_shift_norm False --attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear "
    "--rescale_learned_sigmas False --rescale_timesteps False"
)
GUIDED = {
    "64x64_diffusion": (
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 --image_size 64 "
        "--learn_sigma True --noise_schedule cosine --num_channels 192 --num_head_channels 64 --num_res_blocks 3 "
        "--resblock_updown True --use_new_attention_order True --use_fp16 True --use_scale_shift_norm True",
        295_904_454,
        541,
    ),
    "128x128_diffusion": (ADM.format(128, "--num_heads 4"), 421_529_606, 493),
    "256x256_diffusion": (ADM.format(256, "--num_head_channels 64"), 553_838_086, 567),
    "256x256_diffusion_uncond": (
        ADM.format(256, "--num_head_channels 64").replace("--class_cond True", "--class_cond False"),
        552_814_086,
        566,
    ),
    "512x512_diffusion": (ADM.format(512, "--num_head_channels 64"), 558_997_638, 645),
    "64_256_upsampler": (
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --large_size 256 --small_size 64 "
        "--learn_sigma True --noise_schedule linear --num_channels 192 --num_heads 4 --num_res_blocks 2 "
        "--resblock_updown True --use_fp16 True --use_scale_shift_norm True",
        311_795_910,
        567,
    ),
    "128_512_upsampler": (
        "--attention_resolutions 32,16 --class_cond True --diffusion_steps 1000 --large_size 512 --small_size 128 "
        "--learn_sigma True --noise_schedule linear --num_channels 192 --num_head_channels 64 --num_res_blocks 2 "
        "--resblock_updown True --use_fp16 True --use_scale_shift_norm True",
        308_835_270,
        537,
    ),
    "lsun_bedroom": (LSUN, 552_814_086, 566),
    "lsun_cat": (LSUN, 552_814_086, 566),
    "lsun_horse": (LSUN, 552_814_086, 566),
    "lsun_horse_nodropout": (LSUN.replace("--dropout 0.1", "--dropout 0.0"), 552_814_086, 566),
}
IMPROVED = {
    "imagenet64_uncond_100M_1500K": (IMAGENET, 121_063_942, 450),
    "cifar10_uncond_50M_500K": (CIFAR, 52_546_438, 446),
    "imagenet64_cond_270M_250K": (
        "--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True --class_cond True "
        "--diffusion_steps 4000 --noise_schedule cosine --rescale_learned_sigmas False --rescale_timesteps False",
        273_049_350,
        451,
    ),
    "upsample_cond_500K": (
        "--large_size 256 --small_size 64 --num_channels 192 --num_res_blocks 2 --learn_sigma True --class_cond True "
        "--diffusion_steps 4000 --noise_schedule linear --rescale_learned_sigmas False --rescale_timesteps False",
        279_792_390,
        457,
    ),
    "lsun_uncond_100M_1200K_bs128": (OLD_LSUN, 113_676_678, 426),
    "lsun_uncond_100M_2400K_bs64": (OLD_LSUN, 113_676_678, 426),
    "imagenet64_uncond_vlb_100M_1500K": (IMAGENET + " --use_kl True", 121_063_942, 450),
    "cifar10_uncond_vlb_50M_500K": (CIFAR + " --use_kl True", 52_546_438, 446),
}


def golden(name: str, **options: Any) -> Card:
    """The card of a stored network, from the arguments of its constructor."""
    arguments = json.loads((DATA / f"unet_{name}.json").read_text())
    size = arguments["image_size"]
    return Card(
        image_size=size,
        num_channels=arguments["model_channels"],
        num_res_blocks=arguments["num_res_blocks"],
        num_heads=arguments.get("num_heads", 1),
        num_head_channels=arguments.get("num_head_channels", -1),
        attention_resolutions=tuple(size // factor for factor in arguments["attention_resolutions"]),
        channel_mult=tuple(arguments["channel_mult"]),
        class_cond="num_classes" in arguments,
        use_scale_shift_norm=arguments["use_scale_shift_norm"],
        resblock_updown=arguments.get("resblock_updown", False),
        use_new_attention_order=arguments.get("use_new_attention_order", False),
        learn_sigma=arguments["out_channels"] == 2 * arguments["in_channels"],
        in_channels=arguments["in_channels"],
        num_classes=arguments.get("num_classes", 1000),
        **options,
    )


def io(name: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    with np.load(DATA / f"unet_{name}_io.npz") as file:
        x, t, out = (torch.from_numpy(file[key]) for key in ("x", "t", "out"))
        return x, t, {"y": torch.from_numpy(file["y"])} if "y" in file else {}, out


# ---------------------------------------------------------------------- cards


def test_every_published_checkpoint_has_a_card():
    assert CARDS.keys() == GUIDED.keys() | IMPROVED.keys()


@pytest.mark.parametrize("name", [*GUIDED, *IMPROVED])
def test_cards_are_the_readmes_flags(name):
    flags = {**GUIDED, **IMPROVED}[name][0]
    assert Card.from_flags(flags, improved=name in IMPROVED) == CARDS[name]


@pytest.mark.parametrize("name", [*GUIDED, *IMPROVED])
def test_sizes_of_published_networks(name):
    _, parameters, tensors = {**GUIDED, **IMPROVED}[name]
    net = interop._net(CARDS[name])
    assert all(parameter.is_meta for parameter in net.parameters())
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert len(set(interop.parameter_names(net).values())) == tensors


def test_what_a_published_checkpoint_becomes():
    """Improved-diffusion's CIFAR-10 networks see the index of 4000 steps squeezed into 0..1000."""
    card = CARDS["cifar10_uncond_vlb_50M_500K"]
    diffusion = interop._diffusion(interop._net(card), card, True)
    kernel = diffusion.reverse_kernel
    assert (diffusion.steps, tuple(diffusion.event_shape)) == (4000, (3, 32, 32))
    assert (kernel.prediction, kernel.variance, kernel.decoder) == ("eps", "learned_range", "openai")
    assert kernel.bins == (256, -1.0, 1.0)
    config = diffusion.net.config
    assert (config["index_step"], config["heads"], config["dropout"]) == (0.25, 4, 0.3)


@pytest.mark.parametrize(
    ("flags", "prediction", "variance"),
    [
        ("", "eps", "fixed_large"),
        ("--sigma_small True", "eps", "fixed_small"),
        ("--learn_sigma True --sigma_small True", "eps", "learned_range"),
        ("--predict_xstart True", "x0", "fixed_large"),
    ],
)
def test_what_the_output_means(flags, prediction, variance):
    card = Card.from_flags(flags)
    kernel = interop._diffusion(interop._net(card), card, True).reverse_kernel
    assert (kernel.prediction, kernel.variance, kernel.clip) == (prediction, variance, True)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--image_size", "--name value"),
        ("image_size 64", "--name value"),
        ("--colour red", "colour"),
        ("--image_size big", "image_size"),
        ("--learn_sigma maybe", "learn_sigma"),
        ("--attention_resolutions 16,x", "attention_resolutions"),
        ("--noise_schedule sigmoid", "noise_schedule"),
        ("--image_size 48", "channel_mult"),
        ("--diffusion_steps 0", "diffusion_steps"),
        ("--dropout nan", "dropout"),
    ],
)
def test_flags_that_are_refused(flags, named):
    with pytest.raises(OptionError, match=named):
        Card.from_flags(flags)


def test_the_file_s_name_names_the_card(tmp_path):
    assert interop.as_card(None, tmp_path / "lsun_cat.pt") is CARDS["lsun_cat"]
    (tmp_path / "mine.json").write_text(json.dumps({"image_size": 32, "attention_resolutions": [8]}))
    mine = Card(image_size=32, attention_resolutions=(8,))
    assert interop.as_card(None, tmp_path / "mine.pt") == mine
    assert interop.as_card(tmp_path / "mine.json") == mine
    for card, path in ((None, tmp_path / "other.pt"), ("64x64", "")):
        with pytest.raises(OptionError, match="64x64_diffusion"):
            interop.as_card(card, path)


@pytest.mark.parametrize(
    "content",
    [{"colour": 1}, {"image_size": "64"}, {"image_size": True}, {"channel_mult": [None]}, {"num_channels": None}],
    ids=str,
)
def test_files_of_flags_that_are_refused(tmp_path, content):
    (tmp_path / "card.json").write_text(json.dumps(content))
    with pytest.raises(OptionError, match=next(iter(content))):
        interop.as_card(tmp_path / "card.json")


# ---------------------------------------------------------------------- weights


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", ["u1", "u2", "u3"])
def test_the_diffusion_calls_its_network_at_their_index(name, rescale):
    """Step t of the program is index t - 1, or (t - 1) * 1000 / T: the figures are theirs."""
    steps = 4000 if rescale else 1000
    card = golden(name, rescale_timesteps=rescale, diffusion_steps=steps, noise_schedule="cosine")
    diffusion = interop.load(DATA / f"unet_{name}.pt", card, clip=False)
    x, index, cond, expected = io(name)
    t = (steps // 1000) * index.long() + 1
    with torch.no_grad():
        predicted = diffusion.reverse_kernel.predict(x, t, **cond)
        alpha, sigma = (f(t).float().reshape(-1, 1, 1, 1) for f in (diffusion.schedule.alpha, diffusion.schedule.sigma))
    mean = expected[:, : x.shape[1]]
    torch.testing.assert_close((x - alpha * predicted.x0_hat) / sigma, mean, atol=1e-4, rtol=1e-4)
    if card.learn_sigma:
        torch.testing.assert_close(predicted.variance_output, expected[:, x.shape[1] :], atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(diffusion.net(x, index=index, **cond), expected, atol=1e-5, rtol=0)


def test_it_is_a_program():
    diffusion = interop.load(DATA / "unet_u3.pt", golden("u3", diffusion_steps=100)).respace("4")
    x0 = (torch.randint(0, 256, (2, 1, 8, 8)) / 127.5) - 1
    terms = pyrodiff.elbo_terms(diffusion, x0)
    assert torch.isfinite(terms.elbo).all()
    assert pyrodiff.sample(diffusion, 2).shape == (2, 1, 8, 8)


def test_an_upsampler_sees_the_smaller_image(tmp_path):
    """With the weights on the smaller image zero it is the network without; with others, not."""
    card = golden("u3")
    state = torch.load(DATA / "unet_u3.pt", weights_only=True)
    x, index, _, expected = io("u3")
    low_res = torch.randn(len(x), 1, 2, 2)
    weight = state["input_blocks.0.0.weight"]
    for extra, same in ((torch.zeros_like(weight), True), (torch.ones_like(weight), False)):
        torch.save({**state, "input_blocks.0.0.weight": torch.cat([weight, extra], 1)}, tmp_path / "up.pt")
        upsampler = interop.load(tmp_path / "up.pt", Card(**{**asdict(card), "small_size": 2}))
        with torch.no_grad():
            out = upsampler.net(x, index=index, low_res=low_res)
        assert torch.allclose(out, expected, atol=1e-5) == same
    # shown to the convolution as the bilinear enlargement
    larger = torch.nn.functional.interpolate(low_res, x.shape[2:], mode="bilinear", align_corners=False)
    with torch.no_grad():
        torch.testing.assert_close(upsampler.net(x, index=index, low_res=larger), out)
    assert pyrodiff.sample(upsampler.respace("3"), 2, low_res=low_res[:2]).shape == (2, 1, *x.shape[2:])
    with pytest.raises(OptionError, match="low_res is missing"):
        upsampler.net(x, index=index)


def test_loading_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    interop.load(DATA / "unet_u3.pt", golden("u3"))
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_trainable_and_our_own(tmp_path):
    """Tensors that share memory in the file do not share it in the network."""
    state = torch.load(DATA / "unet_u3.pt", weights_only=True)
    pair = ("input_blocks.1.0.in_layers.0.weight", "input_blocks.1.0.in_layers.0.bias")
    state |= dict.fromkeys(pair, torch.ones(1).expand(32))
    torch.save(state, tmp_path / "shared.pt")
    net = interop.load(tmp_path / "shared.pt", golden("u3")).net
    assert all(p.requires_grad and p.is_leaf and p.is_contiguous() for p in net.parameters())
    assert len({p.data_ptr() for p in net.parameters()}) == len(list(net.parameters()))


# ---------------------------------------------------------------------- saving


@pytest.mark.parametrize("name", ["u1", "u2", "u3"])
def test_saving_gives_their_file_back(tmp_path, name):
    card = golden(name, rescale_timesteps=True, diffusion_steps=50)
    interop.save(tmp_path / "back.pt", interop.load(DATA / f"unet_{name}.pt", card))
    theirs = torch.load(DATA / f"unet_{name}.pt", weights_only=True)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], theirs[key].float()) for key in theirs)
    again = interop.load(tmp_path / "back.pt")  # the flags lie beside it
    x, index, cond, expected = io(name)
    with torch.no_grad():
        torch.testing.assert_close(again.net(x, index=index, **cond), expected, atol=1e-5, rtol=0)
    assert again.config == interop.load(DATA / f"unet_{name}.pt", card).config


@pytest.mark.parametrize(
    ("network", "options", "named"),
    [
        ({}, {}, "time_embedding"),
        ({"time_embedding": "index", "norm_groups": 4}, {}, "norm_groups"),
        ({"time_embedding": "index", "fourier_features": [3]}, {}, "fourier_features"),
        ({"time_embedding": "index", "middle_attention": "none"}, {}, "middle_attention"),
        ({"time_embedding": "index", "index_shift": 1}, {}, "index_shift"),
        ({"time_embedding": "index"}, {"prediction": "v"}, "prediction"),
        ({"time_embedding": "index", "index_step": 3.0}, {}, "steps"),
    ],
    ids=str,
)
def test_what_guided_diffusion_cannot_hold_is_named(tmp_path, network, options, named):
    net = UNet(2, **{"width": 32, "multipliers": [1, 2], "blocks": 1, **network})
    diffusion = GaussianDiffusion(net, pyrodiff.CosineSchedule(10), (2, 8, 8), **options)
    with pytest.raises(OptionError, match=named):
        interop.save(tmp_path / "out.pt", diffusion)
    assert list(tmp_path.iterdir()) == []


def test_a_null_class_is_their_last_class(tmp_path):
    net = UNet(
        2, width=32, multipliers=[1, 2], blocks=1, norm_groups=32, time_embedding="index", classes=3, label_dropout=0.2
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    diffusion = GaussianDiffusion(net.eval(), pyrodiff.CosineSchedule(10), (2, 8, 8))
    assert interop.card_of(diffusion).num_classes == 4
    interop.save(tmp_path / "out.pt", diffusion)
    back = interop.load(tmp_path / "out.pt").net
    assert (back.config["classes"], back.null_cond, net.null_cond) == (4, {}, {"y": 3})
    x, index = torch.randn(4, 2, 8, 8), torch.arange(4)
    with torch.no_grad():
        expected = net(x, index=index, y=torch.arange(4))
        torch.testing.assert_close(back(x, index=index, y=torch.arange(4)), expected, atol=1e-6, rtol=1e-6)
        assert (back(x, index=index, y=torch.zeros(4, dtype=torch.int64)) - expected)[3].abs().max() > 1e-3


# ---------------------------------------------------------------------- classifiers

# The flags of the README, word for word, and the parameters and tensors of what their scripts then build.
PUBLISHED_CLASSIFIERS = {
    "64x64_classifier": (
        GUIDED["64x64_diffusion"][0] + " --classifier_scale 1.0 --classifier_depth 4",
        65_438_568,
        307,
    ),
    "128x128_classifier": (GUIDED["128x128_diffusion"][0] + " --classifier_scale 0.5", 42_568_040, 221),
    "256x256_classifier": (GUIDED["256x256_diffusion_uncond"][0] + " --classifier_scale 10.0", 54_096_360, 249),
    "512x512_classifier": (GUIDED["512x512_diffusion"][0] + " --classifier_scale 4.0", 54_448_360, 281),
}
TRAINING = (
    "--image_size 128 --classifier_attention_resolutions 32,16,8 --classifier_depth 2 --classifier_width 128 "
    "--classifier_pool attention --classifier_resblock_updown True --classifier_use_scale_shift_norm True"
)


def small(pool: str, **options: Any) -> ClassifierCard:
    """The card of the stored classifiers, from the arguments of their constructor."""
    arguments = json.loads((DATA / "classifier.json").read_text())
    size = arguments["image_size"]
    return ClassifierCard(
        image_size=size,
        classifier_width=arguments["model_channels"],
        classifier_depth=arguments["num_res_blocks"],
        classifier_attention_resolutions=tuple(size // factor for factor in arguments["attention_resolutions"]),
        classifier_use_scale_shift_norm=arguments["use_scale_shift_norm"],
        classifier_resblock_updown=arguments["resblock_updown"],
        classifier_pool=pool,
        channel_mult=tuple(arguments["channel_mult"]),
        num_head_channels=arguments["num_head_channels"],
        in_channels=arguments["in_channels"],
        num_classes=arguments["out_channels"],
        **options,
    )


@pytest.fixture(params=["attention", "adaptive"])
def stored(request, tmp_path) -> tuple[pathlib.Path, str, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A stored classifier, the name of its pool, inputs and their outputs."""
    state = torch.load(DATA / "classifier.pt", weights_only=True)
    other = {"attention": "out.3.", "adaptive": "out.2."}[request.param]
    path = tmp_path / "classifier.pt"
    torch.save({key: value for key, value in state.items() if not key.startswith(other)}, path)
    with np.load(DATA / "classifier_io.npz") as file:
        return path, request.param, *(torch.from_numpy(file[key]) for key in ("x", "t", request.param))


@pytest.mark.parametrize("name", PUBLISHED_CLASSIFIERS)
def test_published_classifiers(name):
    """Flags, sizes, and the noise they were trained on: that of the diffusion model that they guide."""
    flags, parameters, tensors = PUBLISHED_CLASSIFIERS[name]
    flags += f" --classifier_path models/{name}.pt --model_path models/{name.replace('classifier', 'diffusion')}.pt"
    card, guided = CLASSIFIERS[name], CARDS[name.replace("classifier", "diffusion")]
    assert ClassifierCard.from_flags(flags) == card
    assert card.schedule.config == guided.schedule.config
    net = interop._classifier(card)
    assert all(parameter.is_meta for parameter in net.parameters())
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert len(set(interop.parameter_names(net).values())) == tensors
    assert net.config["log_snr_table"] == card.schedule.log_snr(torch.arange(1, 1001)).tolist()


def test_flags_of_classifiers():
    assert CLASSIFIERS.keys() == PUBLISHED_CLASSIFIERS.keys()
    for flags in (TRAINING, TRAINING + " --classifier_scale 1.0 --classifier_use_fp16 True"):
        assert ClassifierCard.from_flags(flags) == CLASSIFIERS["128x128_classifier"]
    # those of the diffusion model are not its own, where both have a name
    assert ClassifierCard.from_flags("--num_head_channels 32 --channel_mult 1,1 --num_classes 7") == ClassifierCard()
    for flags, named in (
        ("--classifier_colour red", "classifier_colour"),
        ("--classifier_pool spatial", "'attention', 'adaptive'"),
        ("--classifier_depth 0", "classifier_depth"),
        ("--classifier_attention_resolutions 128", "classifier_attention_resolutions"),
        ("--image_size 48", "channel_mult"),
    ):
        with pytest.raises(OptionError, match=named):
            ClassifierCard.from_flags(flags)


def test_classifiers_equal_theirs(stored):
    path, pool, x, index, expected = stored
    net = interop.load_classifier(path, small(pool)).net
    with torch.no_grad():
        out = net(x, index=index)
    assert not net.training and out.dtype == torch.float32
    assert (expected - expected[0]).abs().max() > 0.1, "a figure this small would not tell a wrong network"
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rescale", [False, True])
def test_classifiers_see_the_index_of_their_own_chain(stored, rescale):
    """Step t is index t - 1, or (t - 1) * 1000 / T."""
    path, pool, x, index, expected = stored
    steps = 4000 if rescale else 1000
    card = small(pool, diffusion_steps=steps, rescale_timesteps=rescale, noise_schedule="cosine")
    with torch.no_grad():
        logits = interop.load_classifier(path, card)(x, (steps // 1000) * index + 1).logits
    # a Categorical's logits are normalised
    torch.testing.assert_close(logits, expected.log_softmax(1), atol=1e-5, rtol=0)


def test_what_a_classifiers_file_does_not_tell_matters(stored):
    """Negative control: flags that fit the weights' shapes and still are the wrong ones."""
    path, pool, x, index, expected = stored
    card = ClassifierCard(**{**asdict(small(pool)), "num_head_channels": 32})
    with torch.no_grad():
        assert (interop.load_classifier(path, card).net(x, index=index) - expected).abs().max() > 1e-3


def test_the_name_of_a_classifiers_file(tmp_path, stored):
    path, pool, x, index, expected = stored
    path.with_suffix(".json").write_text(json.dumps(asdict(small(pool))))
    with torch.no_grad():
        torch.testing.assert_close(interop.load_classifier(path).net(x, index=index), expected, atol=1e-5, rtol=0)
    assert interop.as_classifier_card(None, tmp_path / "256x256_classifier.pt") is CLASSIFIERS["256x256_classifier"]
    with pytest.raises(OptionError, match="64x64_classifier, 128x128_classifier"):
        interop.as_classifier_card(None, tmp_path / "other.pt")
    (tmp_path / "odd.json").write_text(json.dumps({"num_channels": 3}))
    with pytest.raises(OptionError, match="num_channels"):
        interop.as_classifier_card(tmp_path / "odd.json")


def test_one_kind_of_file_for_the_other(tmp_path, stored):
    """By its name, its card or its content: one line that says who reads it."""
    path, pool, *_ = stored
    unet, card = DATA / "unet_u3.pt", golden("u3")
    for read, arguments, kind, by in (
        (interop.load, (tmp_path / "64x64_classifier.pt",), OptionError, "load_classifier"),
        (interop.load, (path, "64x64_classifier"), OptionError, "load_classifier"),
        (interop.load, (path, small(pool)), OptionError, "load_classifier"),
        (interop.load, (path, card), CheckpointError, "load_classifier"),
        (interop.load_classifier, (tmp_path / "64x64_diffusion.pt",), OptionError, "load takes it"),
        (interop.load_classifier, (unet, "lsun_cat"), OptionError, "load takes it"),
        (interop.load_classifier, (unet, card), OptionError, "load takes it"),
        (interop.load_classifier, (unet, small(pool)), CheckpointError, "load reads it"),
    ):
        with pytest.raises(kind, match=by) as error:
            read(*arguments)
        assert "\n" not in str(error.value)


def test_classifiers_that_do_not_fit(tmp_path, stored):
    path, pool, *_ = stored
    other = {"attention": "adaptive", "adaptive": "attention"}[pool]
    with pytest.raises(CheckpointError, match=r"missing .* unexpected"):
        interop.load_classifier(path, small(other))
    torch.save({**torch.load(path, weights_only=True), "evil": Evil(tmp_path / "ran")}, path)
    with pytest.raises(CheckpointError):
        interop.load_classifier(path, small(pool))
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------- files that are none


class Evil:
    """What a pickle could do when it is read: make a file."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


def refused(path: pathlib.Path, match: str = ".") -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        interop.load(path, golden("u3"))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_hostile_pickle_is_not_run(tmp_path, new):
    state = torch.load(DATA / "unet_u3.pt", weights_only=True)
    torch.save({**state, "evil": Evil(tmp_path / "ran")}, tmp_path / "evil.pt", _use_new_zipfile_serialization=new)
    refused(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the file is not hostile, and this test worth nothing"


def test_a_compressed_archive_is_refused_unread(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry), compress_type=zipfile.ZIP_DEFLATED)
    refused(tmp_path / "bomb.pt", "compressed entries")


def test_an_archive_with_overlapping_entries_is_refused_unread(tmp_path):
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "bomb.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "a") as bomb:
        largest = max(bomb.infolist(), key=lambda entry: entry.file_size)
        for i in range(3):  # listed again, at the same place in the file
            entry = copy.copy(largest)
            entry.filename = largest.filename + str(i)
            bomb.filelist.append(entry)
        bomb._didModify = True
    refused(tmp_path / "bomb.pt", "overlap")


def test_damaged_files(tmp_path):
    whole = (DATA / "unet_u3.pt").read_bytes()
    path = tmp_path / "damaged.pt"
    generator = np.random.default_rng(0)
    for keep in (0, 1, 2, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        refused(path)
    for _ in range(20):  # a flipped byte in the directory at the end
        damaged = bytearray(whole)
        damaged[len(whole) - int(generator.integers(1, 2000))] ^= 0xFF
        path.write_bytes(damaged)
        try:
            interop.load(path, golden("u3"))
        except CheckpointError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"state": {}, "param_groups": []}, "optimiser"),
        ([torch.zeros(1)], "no state dict"),
        ({1: torch.zeros(1)}, "no state dict"),
        ({"a": torch.zeros(2).to_sparse()}, "no weights"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "no weights"),
        ({"a": torch.zeros(2, device="meta")}, "no weights|cannot be read"),
        ({"out.2.bias\n": torch.zeros(1)}, "1 unexpected"),
        ({}, "missing"),
    ],
    ids=range(8),
)
def test_foreign_content(tmp_path, content, match):
    torch.save(content, tmp_path / "foreign.pt")
    refused(tmp_path / "foreign.pt", match)


def test_weights_that_are_not_finite(tmp_path):
    state = torch.load(DATA / "unet_u3.pt", weights_only=True)
    state["out.2.bias"][0] = torch.inf
    torch.save(state, tmp_path / "infinite.pt")
    refused(tmp_path / "infinite.pt", r"1 not finite \(out.2.bias\)")


def test_paths_that_are_no_files(tmp_path):
    refused(tmp_path, "folder")
    refused(tmp_path / "absent.pt", "No such file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "no regular file")
