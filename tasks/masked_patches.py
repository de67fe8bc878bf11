"""The masked-patches task: a vision transformer draws hidden patches of pictures, and needs no classes to learn it.

    python train.py config/fashion_mnist_masked.py
    python prepare.py my_pictures/ --image_size=64       a folder of pictures; then --dataset=my_pictures
    python sample.py --out_dir=out/fashion_mnist_masked --image=shirt.png --draw=guess.png
    python evaluate.py --out_dir=out/fashion_mnist_masked
    python train.py config/fashion_mnist.py --init_from=out/fashion_mnist_masked --train_rows=200

The loss is the mean squared error of the pixels of the hidden patches. With normalise = True a patch's pixels are taken
less their mean and divided by their standard deviation (He et al. 2022), so that only its pattern counts: who always
guesses 0 has a loss of about 1, and of 0 for a patch of one colour. The data are pictures without classes, by class, or
with text; classes and text are not read.

Axes: B batch, N patches of a picture, A hidden ones, P pixel values of a patch, S side of a picture in pixels.
"""

import functools

import numpy as np
import torch

from batches import fixed_rows, read_images
from configurator import UserError
from machine.device import autocast
from machine.terminal import watched
from run import pictures
from run.pictures import save_picture
from tasks.image_classification import AT_ONCE, PictureTask
from tasks.image_text import check_patch, check_size, image_of
from vit import MaskedPatches, MaskedPatchesConfig, blanked, images_of, mean_and_spread, patches_of

MOST_PICTURES = 50_000  # training pictures from which the mean picture is made
PANEL = 168  # pixels of a picture's side in --draw


class MaskedPatchesTask(PictureTask):
    models = {"masked_patches": (MaskedPatches, MaskedPatchesConfig)}

    def open(self, folder, world):
        super().open(folder, world)
        self.images = {split: np.unique(found) for split, found in self.images.items()}  # several rows may share one

    def own(self):
        return {"normalise": self.settings.normalise}

    def adopt(self, model, generator):
        """The model of init_from, if it is one of this task; else its ViT under a new head."""
        return model if type(model) is MaskedPatches else super().adopt(model, generator)

    def shape(self, model):
        return {**super().shape(model), "normalise": model.config.normalise}

    def fit(self, model):
        vision = model.config.vision
        check_size(model, self.dataset)
        check_patch("patch_size", vision.patch_size, vision.image_size)
        if vision.n_patches == 1:
            raise UserError(f"patch_size = {vision.patch_size}: is the whole picture, so nothing of it is visible when"
                            " a patch is hidden; use a smaller one")
        self.N = vision.n_patches

    def share(self, N):
        """How many of N patches are hidden, A."""
        return min(N - 1, max(1, round(self.settings.mask_rate * N)))

    def places(self, count, N, generator):
        """Which of the N patches of each of `count` pictures to hide, in order: (count, A)."""
        return torch.rand(count, N, generator=generator).argsort(1)[:, :self.share(N)].sort(1).values

    def weight(self, rows):
        return len(rows) * self.share(self.N)

    def batch(self, rows, generator):
        images = self.read(rows, generator)
        places = self.places(len(rows), self.N, generator).to(images.device)
        targets = chosen(self.targets(images), places)
        return {"images": images, "places": places, "targets": targets}, torch.ones(places.shape, device=images.device)

    def targets(self, images):
        """What there is to predict of every patch of the images: (B, N, P)."""
        return targets_of(images, self.settings.patch_size, self.settings.normalise)

    # ------------------------------------------------------------------------------------------------------------------
    # Measures

    def parts(self, split, world, limit=0):
        """Yields (images, places, targets (B, N, P), weight) of a split. The same patches are hidden each time."""
        most = max(1, limit // self.N) if limit else 0
        for rows, weight in world.share(fixed_rows(len(self.images[split]), AT_ONCE, most)):
            generator = torch.Generator().manual_seed(int(rows[0]))
            images = read_images(self.dataset.images, self.images[split][rows], world.device)
            places = self.places(len(rows), self.N, generator).to(world.device)
            yield images, places, self.targets(images), weight  # weight: 0 for rows that another rank counts

    @torch.no_grad()
    def evaluate(self, model, split, world, dtype, limit=0):
        """{"loss": mean squared error of the hidden patches}."""
        total = count = 0
        for images, places, targets, weight in self.parts(split, world, limit):
            with autocast(world.device, dtype):
                errors = model(images, places, chosen(targets, places))
            total, count = total + weight * errors.sum().item(), count + weight * errors.numel()
        total, count = world.sum(total, count)
        return {"loss": total / count}

    def details(self, model, split, world, dtype, settings, found):
        """{name: value}: the loss of guesses that need no model, on the same patches."""
        totals, count = {}, 0
        for _, places, targets, weight in self.parts(split, world):
            for name, guess in self.guesses(targets, places).items():
                errors = (guess - chosen(targets, places)).square().mean(-1)
                totals[name] = totals.get(name, 0) + weight * errors.sum().item()
            count += weight * places.numel()
        count, *sums = world.sum(count, *totals.values())
        return {f"loss, {name}": total / count for name, total in zip(totals, sums)}

    def guesses(self, targets, places):
        """{name: guess (B, A, P) of the hidden patches} without a model. targets: (B, N, P), of all patches."""
        seen = torch.ones(targets.shape[:2], device=targets.device).scatter(1, places, 0)  # (B, N)
        mean = (targets * seen[..., None]).sum(1, keepdim=True) / seen.sum(1)[:, None, None]
        return {"mean of the visible patches": mean.expand(-1, places.size(1), -1),
                "mean training picture": self.mean_targets[places],
                "nearest visible patch": chosen(targets, nearest_visible(seen, places))}

    @functools.cached_property
    def mean_targets(self):
        """The mean of the targets over the training pictures: (N, P)."""
        total, count = 0, 0
        for rows in watched(fixed_rows(len(self.images["train"]), AT_ONCE, MOST_PICTURES), "the mean picture"):
            images = read_images(self.dataset.images, self.images["train"][rows], self.world.device)
            total, count = total + self.targets(images).sum(0), count + len(rows)
        return total / count

    # ------------------------------------------------------------------------------------------------------------------
    # Guesses

    @torch.inference_mode()
    def guess(self, model, image, places):
        """(loss, the image with the guesses in the hidden patches). image: (3, S, S). places: (A,).

        A model that predicts normalised pixels does not say how bright a patch is, so the guess gets the right mean
        and spread.
        """
        config, patch = model.config, model.config.vision.patch_size
        patches = patches_of(image[None], patch)
        targets = targets_of(image[None], patch, config.normalise)
        found = model(image[None], places[None])  # (1, A, P)
        loss = (found - chosen(targets, places[None])).square().mean().item()
        if config.normalise:
            mean, spread = mean_and_spread(patches[:, places])
            found = found * spread + mean
        patches[:, places] = found
        return loss, images_of(patches, patch)[0]

    def sample(self, model, requests, sampling):
        """Yields (index of a request, the loss of the guess); sampling.draw names a picture to write of all guesses."""
        vision, panels = model.config.vision, []
        device, generator = next(model.parameters()).device, torch.Generator().manual_seed(sampling.seed)
        for index, request in enumerate(requests):
            image = pictures.pixels(image_of(request), vision.image_size).to(device)
            places = self.places(1, vision.n_patches, generator)[0].to(device)
            loss, guess = self.guess(model, image, places)
            path = f"{request['image']}: " * (len(requests) > 1)
            yield index, f"{path}{len(places)} of {vision.n_patches} patches hidden, loss {loss:.4f}"
            hidden = torch.zeros(1, vision.n_patches, dtype=torch.bool, device=device)
            hidden[:, places] = True
            seen = blanked(image[None], hidden, vision.patch_size)[0]
            panels += panels_of(seen, guess, image, loss)
        if sampling.draw:
            yield index, "\n"
            yield index, save_picture(pictures.in_grid(panels, 3), sampling.draw)

    def show(self, model, short=False):
        """The loss of pictures of the validation part: ten, or if short three."""
        images, count, shown = self.images["val"], 3 if short else 10, []
        for place in np.arange(min(count, len(images))) * len(images) // min(count, len(images)):
            image = read_images(self.dataset.images, images[[place]], self.world.device)[0]
            places = self.places(1, self.N, torch.Generator().manual_seed(int(place)))[0].to(image.device)
            shown.append(f"picture {place}: loss {self.guess(model, image, places)[0]:.4f}")
        return "\n".join(shown)

    def command(self, out_dir):
        return f"{super().command(out_dir)} --draw=guess.png"

    def summary(self, model):
        return f"{super().summary(model)}; {self.share(self.N)} patches of each are hidden"


def targets_of(images, patch_size, normalise):
    """What there is to predict of every patch of images (B, 3, S, S): (B, N, P)."""
    patches = patches_of(images, patch_size)
    if not normalise:
        return patches
    mean, spread = mean_and_spread(patches)
    return (patches - mean) / spread


def chosen(patches, places):
    """The patches (B, A, P) at some places (B, A) of patches (B, N, P)."""
    return patches.gather(1, places[..., None].expand(-1, -1, patches.size(-1)))


def nearest_visible(seen, places):
    """The places (B, A) of the visible patches that are nearest to those at `places`. seen: (B, N), 1 if visible."""
    side = round(seen.size(1)**0.5)
    at = torch.arange(seen.size(1), device=seen.device)
    where = torch.stack((at // side, at % side), dim=1).float()  # (N, 2)
    distances = torch.cdist(where, where)[places]  # (B, A, N)
    return distances.masked_fill(seen[:, None] == 0, torch.inf).argmin(-1)


def panels_of(seen, guess, image, loss):
    """PIL images of what a model saw, its guess and the whole image, each (3, S, S), under their names."""
    from PIL import Image
    named = {"seen": seen, f"guess, loss {loss:.3f}": guess, "image": image}
    found = []
    for name, each in named.items():
        values = ((each.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        picture = Image.fromarray(values).resize((PANEL, PANEL), Image.Resampling.NEAREST)
        found.append(pictures.caption(picture, name, PANEL))
    return found
