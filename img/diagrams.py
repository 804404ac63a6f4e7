"""The tutorial's diagrams and curves. Whatever numbers they show come from the project's own functions."""
import math

import examples
import torch
import torch.nn.functional as F
import trained
from drawing import arrow, block, canvas, figure, grid, outline, panels, rendered, series, small, table, write
from matplotlib.patheffects import withStroke
from photographs import photograph
from torchvision.models import vgg16

import train
import utils
from datasets import collate_fn
from model import AuxiliaryConvolutions, MultiBoxLoss, PredictionConvolutions, VGGBase, match

map_colors = dict(zip(utils.feature_maps, series))


# ---------------------------------------------------------------------------------------------------------- The network

convolution_color = ('faint', 0.4)


def output_shapes(layers, module, image):
    """What layers of a module, a dict of name -> layer, make of an image: dict of name -> shape, which is (channels,
    size, size), or (outputs) if fully connected. The first is the image's."""
    shapes = {'image': tuple(image.shape[1:])}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, inputs, output, name=name: shapes.update({name: tuple(output.shape[1:])}))
    module(image)
    return shapes


def stages(shapes):
    """The names of the layers in VGG-16's five stages of convolutions and a pool, a list of five lists."""
    return [[name for name in shapes if name.startswith((f'conv{i}_', f'pool{i}'))] for i in range(1, 6)]


def draw_layers(axes, groups, shapes, colors, legend):
    """Draw layers, in groups of names, from left to right: each a slab as high as its map, and the wider the more
    channels; beneath each group its shape and names. `colors` has those of slabs that are neither convolutions nor
    pools, or stand out; `legend` says what colors mean, in tuples of (left edge, color, text).

    :return: dict of name -> (x of the middle, y of the upper edge) of its slab"""
    for x, color, text in legend:
        block(axes, x, 1, 2, 1.6, fill=color, linewidth=0.8)
        write(axes, x + 3, 1.8, text, ha='left')
    sizes = {name: (0.5 + shape[0] / 600, shape[1] / 14) if len(shape) == 3 else (0.7, shape[0] / 320)
             for name, shape in shapes.items()}
    middle = 12
    bottom = middle + max(height for _, height in sizes.values()) / 2
    texts = []
    for group in groups:
        channels, *sides = shapes[group[0]]
        shown = ['×'.join(map(str, sides)), f'× {channels}'] if sides else [str(channels), '']
        texts.append(shown + [name for name in group if 'pool' not in name or len(group) == 1])
    columns = [0.87 * max(map(len, text)) for text in texts]
    gap = (64 - sum(columns)) / len(groups)
    places, left = {}, gap / 2
    for group, text, column in zip(groups, texts, columns):
        x = left + (column - sum(sizes[name][0] + 0.3 for name in group) + 0.3) / 2
        for name in group:
            thickness, height = sizes[name]
            fill = colors.get(name, 'ink' if 'pool' in name else convolution_color)
            block(axes, x, middle - height / 2, thickness, height, fill=fill, linewidth=0.8)
            places[name] = x + thickness / 2, middle - height / 2
            x += thickness + 0.3
        for i, line in enumerate(text):
            write(axes, left + column / 2, bottom + 2 + 2 * i, line)
        left += column + gap
    return places


@figure('vgg16.svg')
def draw_vgg16():
    """VGG-16: the maps of each stage for an image of 224x224, and the three fully connected layers."""
    with torch.device('meta'):  # tensors that have a shape, but no numbers
        vgg, image, names = vgg16(), torch.zeros(1, 3, 224, 224), [name for name, _ in VGGBase().named_children()][:18]
    layers = [layer for layer in vgg.features if not isinstance(layer, torch.nn.ReLU)]
    layers += [layer for layer in vgg.classifier if isinstance(layer, torch.nn.Linear)]
    shapes = output_shapes(dict(zip([*names, 'fc6', 'fc7', 'fc8'], layers, strict=True)), vgg, image)
    *groups, last = stages(shapes)
    connected = series[3], 0.4  # a color
    drawing, axes = canvas(32)
    draw_layers(axes, [['image'], *groups, last[:-1], last[-1:], ['fc6', 'fc7'], ['fc8']], shapes,
                {'image': 'white', 'fc6': connected, 'fc7': connected, 'fc8': connected},
                ((1, convolution_color, 'convolution, ReLU'), (23, 'ink', 'max pool'),
                 (38, connected, 'fully connected')))
    return drawing


@figure('base.svg')
def draw_base():
    """VGGBase: its maps, the changes to VGG-16, and the two maps that are taken out."""
    with torch.device('meta'):  # tensors that have a shape, but no numbers
        base, image = VGGBase(), torch.zeros(1, 3, 300, 300)
    shapes = output_shapes(dict(base.named_children()), base, image)
    drawing, axes = canvas(49.7)
    places = draw_layers(axes, [['image'], *stages(shapes), ['conv6'], ['conv7']], shapes,
                         {'image': 'white', **map_colors},
                         ((33, convolution_color, 'convolution, ReLU'), (51, 'ink', 'max pool')))
    for name in ('conv4_3', 'conv7'):
        x, top = places[name]
        arrow(axes, (x, top), (x, 7.5), map_colors[name])
    write(axes, (places['conv4_3'][0] + places['conv7'][0]) / 2, 6, 'to the predictions')
    sides = {name: shape[1] for name, shape in shapes.items()}
    conv6 = f'{base.conv6.kernel_size[0]}×{base.conv6.kernel_size[1]}, dilation {base.conv6.dilation[0]}'
    changes = {'image': f'The image has {sides["image"]}×{sides["image"]} pixels, not 224×224.',
               'pool3': f'pool3 rounds {sides["conv3_3"] / 2} up to {sides["pool3"]}.',
               'pool5': f'pool5 (3×3, stride 1) does not halve: {sides["conv5_3"]} stays {sides["pool5"]}.',
               'conv6': f'fc6 became conv6 ({conv6}), fc7 became conv7 (1×1). No fc8.',
               'conv4_3': 'To predict, conv4_3 is divided by its L2 norm, times 20.'}
    for i, (name, change) in enumerate(changes.items()):
        x, top = places[name]
        beside = {'image': (x + 2.2, top + 1), 'conv4_3': (x + 2, top - 2)}.get(name, (x + 0.5, top - 2))
        for x, y in (beside, (2.5, 37 + 2.7 * i)):
            write(axes, x, y, str(i + 1), 'wrong', weight='bold',
                  bbox={'boxstyle': 'circle,pad=0.15', 'facecolor': 'wrong', 'edgecolor': 'none'})
        write(axes, 5, 37 + 2.7 * i, change, ha='left')
    return drawing


def draw_map(axes, x, y, side, size, color):
    """A feature map of size x size tiles as a colored square with its upper left corner at (x, y)."""
    block(axes, x, y, side, side, fill=(color, 0.3), edge=color, linewidth=1.2)
    grid(axes, x, y, side, size, color, linewidth=0.5)


@figure('auxiliary.svg')
def draw_auxiliary():
    """The auxiliary convolutions: the five maps to scale, and the layers that lead from one to the next."""
    with torch.device('meta'):  # tensors that have a shape, but no numbers
        auxiliary, conv7_feats = AuxiliaryConvolutions(), torch.zeros(1, 1024, 19, 19)
    layers = dict(auxiliary.named_children())
    shapes = {**output_shapes(layers, auxiliary, conv7_feats), 'conv7': conv7_feats.shape[1:]}
    drawing, axes = canvas(38.5)
    left, edge = 1, 0  # of the column that comes next, and the right one of the last map
    for name in list(utils.feature_maps)[1:]:
        channels, size, _ = shapes[name]
        side = 0.8 * size
        column = max(8, side)
        x = left + (column - side) / 2
        if name != 'conv7':
            arrow(axes, (edge + 0.5, 9), (x - 0.5, 9))
        draw_map(axes, x, 9 - side / 2, side, size, map_colors[name])
        write(axes, left + column / 2, 18.7, name, weight='bold')
        write(axes, left + column / 2, 22, f'{size}×{size}\n× {channels}')
        left, edge = left + column + 3.6, x + side
    for i, (first, second) in enumerate(zip(list(layers)[::2], list(layers)[1::2])):
        y = 27.5 + 3 * i
        for x, name in ((1.5, first), (29, second)):
            layer = layers[name]
            kernel = f'{layer.kernel_size[0]}×{layer.kernel_size[1]}'
            stride = f', stride {layer.stride[0]}' if layer.stride[0] > 1 else ''
            padding = '' if layer.padding[0] or kernel == '1×1' else ', no padding'
            write(axes, x, y, name, ha='left', weight='bold', color=map_colors.get(name, 'ink'))
            write(axes, x + 9, y, f'{kernel}, {layer.in_channels} → {layer.out_channels}{stride}{padding}', ha='left')
    return drawing


@figure('ssd300.svg')
def draw_ssd300():
    """The whole network: from the image to 8732 predictions, and what becomes of them."""
    drawing, axes = canvas(74)
    shade = ('faint', 0.25)
    block(axes, 1, 1, 14, 5, 'image\n300×300 × 3')
    arrow(axes, (8, 6), (8, 9))
    block(axes, 1, 9, 14, 12.5, 'VGGBase', shade)
    arrow(axes, (8, 21.5), (8, 23.5))
    block(axes, 1, 23.5, 14, 27, 'Auxiliary-\nConvolutions', shade)
    block(axes, 38.5, 9, 3, 41.5, 'PredictionConvolutions', shade, rotation=90)
    write(axes, 27.5, 6, 'six feature maps')
    write(axes, 53, 6, 'tiles × priors = predictions')
    total = 0
    for i, (name, priors) in enumerate(examples.priors_by_map().items()):
        y, feature_map = 9 + 7.1 * i + 0.4 * (i > 1), utils.feature_maps[name]
        arrow(axes, (15, y + 2.7), (17.5, y + 2.7))
        draw_map(axes, 18, y, 5.5, feature_map.size, map_colors[name])
        write(axes, 24.5, y + 1.6, name, ha='left', weight='bold')
        write(axes, 24.5, y + 4, f'{feature_map.size}×{feature_map.size} × {feature_map.channels}', ha='left')
        arrow(axes, (36.3, y + 2.7), (38.5, y + 2.7))
        arrow(axes, (41.5, y + 2.7), (43.7, y + 2.7))
        write(axes, 44.5, y + 2.7, f'{feature_map.size}×{feature_map.size} × {priors.shape[1]}', ha='left')
        write(axes, 63, y + 2.7, f'= {priors.shape[:2].numel()}', ha='right')
        total += priors.shape[:2].numel()
    axes.plot([44.5, 63], [51.5, 51.5], color='ink', linewidth=1)
    write(axes, 63, 53.3, str(total), ha='right', weight='bold')
    block(axes, 1, 56, 62, 5, f'{total} × 4 offsets, {total} × n_classes scores', ('prediction', 0.25))
    arrow(axes, (61, 54.3), (61, 56))
    for x, title, text in ((1, 'training: MultiBoxLoss', 'compares with the ground truth\n→ a loss'),
                           (33, 'use: detect_objects', 'decodes, suppresses overlaps\n→ boxes, labels, scores')):
        arrow(axes, (x + 15, 61), (x + 15, 64))
        block(axes, x, 64, 30, 9)
        write(axes, x + 15, 66, title, weight='bold')
        write(axes, x + 15, 70, text)
    return drawing


def products(values, others):
    """The products that a scalar product adds up, written out."""
    return ' + '.join(f'{a:.0f}·{b:.0f}' if b >= 0 else f'{a:.0f}·(−{-b:.0f})'
                      for a, b in zip(values.flatten().tolist(), others.flatten().tolist()))


@figure('fc_as_convolution.svg')
def draw_fc_as_convolution():
    """A fully connected layer, the same as a convolution, and the convolution on a larger map."""
    kernel, small_map, large_map = examples.weights, examples.small_map, examples.large_map
    connected = F.linear(small_map.view(1, 4), kernel.view(1, 4))  # (1, 1)
    one_place, four_places = (F.conv2d(values[None, None], kernel[None, None])[0, 0]
                              for values in (small_map, large_map))  # (1, 1), (2, 2)
    sums = [f'{products(small_map, kernel)} = {connected.item():.0f}', 'the same sum',
            f'{products(large_map[:2, 1:], kernel)} = {four_places[0, 1].item():.0f}, and so on']
    drawing, axes = canvas(45)
    for y, title, inputs, weights, outputs, text in (
            (1.8, 'Fully connected: the map as a row, a weight for each number', small_map.view(1, 4),
             kernel.view(1, 4), connected, sums[0]),
            (14.3, 'Convolution: a kernel as large as the map has one place', small_map, kernel, one_place, sums[1]),
            (29.3, 'On a larger map, the same kernel has four places', large_map, kernel, four_places, sums[2])):
        write(axes, 2, y, title, ha='left', weight='bold', fontsize=12)
        x = 2
        for tensor, color, sign in ((inputs, 'faint', '·' if len(inputs) == 1 else '∗'), (weights, series[3], '='),
                                    (outputs, 'prediction', '')):
            numbers = [[f'{value:.0f}'.replace('-', '−') for value in row] for row in tensor.tolist()]
            fills = [[(color, 0.25)] * tensor.shape[1]] * len(tensor)
            table(axes, x, y + 2 + (len(inputs) - len(tensor)) * 1.5, numbers, (3, 3), fills, fontsize=12)
            x += 3 * tensor.shape[1] + 4
            write(axes, x - 2, y + 2 + len(inputs) * 1.5, sign, fontsize=14)
        write(axes, 2, y + 3.7 + 3 * len(inputs), text, ha='left')
    outline(axes, ((5, 31.3, 11, 37.3), (28, 32.8, 31, 35.8)), 'prediction', linewidth=3)  # a place and its output
    return drawing


@figure('decimation.svg')
def draw_decimation():
    """Every third row and column of a 7x7 kernel, and the 3x3 kernel that is left, spread out by dilation."""
    kept = utils.decimate(torch.arange(49).view(7, 7), (3, 3))  # (3, 3)
    drawing, axes = canvas(58)
    for x, y, title, size, dilation in ((2, 5, 'fc6 as a 7×7 kernel:\nevery third row and column', 7, 3),
                                        (29, 9.5, 'the 3×3 kernel that is left', 3, 1),
                                        (2, 27, 'dilation 3:\nin the same places', 7, 3),
                                        (31, 27, 'dilation 6, as in conv6:\nspread over 13×13 places', 13, 6)):
        texts = [['' if row % dilation or column % dilation else f'{kept[row // dilation, column // dilation]}'
                  for column in range(size)] for row in range(size)]
        fills = [[('prediction', 0.5) if text else 'white' for text in row] for row in texts]
        write(axes, x, y, title, ha='left', va='bottom')
        table(axes, x, y + 1, texts, (2.2, 2.2), fills, edge='faint')
    arrow(axes, (20, 14), (26, 14))
    write(axes, 2, 51, 'Why 6, not 3: pool5 no longer\nhalves the map, so its tiles are half\nas wide, in pixels.',
          ha='left')
    return drawing


def draw_astronaut(axes, x, y, side, *boxes):
    """The photograph in a square with its upper left corner at (x, y), and boxes on it: tuples of fractional boundary
    coordinates (4), color and text. Their white edges show them on an orange suit as well as on black."""
    axes.imshow(photograph('astronaut')[0], extent=(x, x + side, y + side, y), aspect='auto')
    for box_xy, color, text in boxes:
        outline(axes, box_xy * side + torch.tensor([x, y] * 2), color, text, linewidth=2.5,
                facecolor=('white', 0.6) if color == 'ink' else 'none',
                path_effects=[withStroke(linewidth=4.5, foreground='white')])


@figure('one_tile.png')
def draw_one_tile():
    """One tile of conv9_2: its channels, its priors, the box that one prior's offsets and scores make, and the prior's
    row of offsets, with and without moving the channels last."""
    size = utils.feature_maps['conv9_2'].size
    row, column = divmod(examples.tile, size)
    tile_xy = torch.tensor([column, row, column + 1, row + 1]) / size  # (4)
    priors = examples.priors_by_map()['conv9_2'][examples.tile]  # (6, 4)
    prior, prior_row = priors[examples.tile_prior], len(priors) * examples.tile + examples.tile_prior  # (4)
    ratios = '1', 'extra 1', '2', '3', '1/2', '1/3'
    colors = series[3], 'prior', series[2], series[5], series[1], 'faint'
    offset_names = '$g_{cx}$', '$g_{cy}$', '$g_w$', '$g_h$'
    convolutions = PredictionConvolutions(n_classes=len(examples.tile_classes))
    counts = [getattr(convolutions, layer).out_channels for layer in ('loc_conv9_2', 'cl_conv9_2')]
    drawing, axes = canvas(74.5)
    for x, y, title in ((1, 1.8, f'1  a tile of conv9_2 ({size}×{size})'),
                        (33, 1.8, f'2  its {counts[0]} + {counts[1]} channels'),
                        (1, 33.2, '3  its priors'), (33, 33.2, '4  one prior becomes a box'),
                        (1, 65, f'5  row {prior_row}, channels last'), (33, 65, f'6  row {prior_row}, not moved')):
        write(axes, x, y, title, ha='left', weight='bold', fontsize=12)

    draw_astronaut(axes, 1, 5.8, 24, (tile_xy, 'ink', ''))
    grid(axes, 1, 5.8, 24, size, 'white', 1.5)
    for i in range(size ** 2):
        write(axes, 1.4 + 24 / size * (i % size), 6 + 24 / size * (i // size), f'{i}', ha='left', va='top',
              color='white', zorder=4, path_effects=[withStroke(linewidth=2, foreground='ink')])

    for i, name in enumerate(ratios):
        write(axes, 32.2, 7.8 + 4 * i, name, ha='right')
    offsets = [f'{name} {value:.2f}' for name, value in zip(offset_names, examples.tile_offsets.tolist())]
    scores = [f'{name} {value:.1f}'.replace('-', '−')
              for name, value in zip(examples.tile_classes, examples.tile_scores.tolist())]
    for x, layer, texts, text_width in ((33, 'loc_conv9_2', offsets, 7.5), (46.5, 'cl_conv9_2', scores, 13)):
        write(axes, x, 4.3, layer, ha='left')
        n_values = len(texts)
        for i, color in enumerate(colors):
            table(axes, x, 5.8 + 4 * i, [['']] * n_values, (2.5, 4 / n_values), [[(color, 0.6)]] * n_values)
        top = 5.8 + 4 * examples.tile_prior
        table(axes, x + 4, top, [[text] for text in texts], (text_width, 2.5), [[('prior', 0.25)]] * n_values)
        axes.plot([x + 2.5, x + 4], [top, top], [x + 2.5, x + 4], [top + 4, top + 2.5 * n_values], color='ink',
                  linewidth=0.8)

    draw_astronaut(axes, 5.8, 35.5, 26, (tile_xy, 'ink', ''),
                   *((prior_xy, color, '') for prior_xy, color in zip(utils.cxcy_to_xy(priors), colors)))
    score, label = examples.tile_scores.softmax(dim=0).max(dim=0)
    decoded = utils.gcxgcy_to_cxcy(examples.tile_offsets, prior)  # (4)
    draw_astronaut(axes, 33.5, 35.5, 26, (utils.cxcy_to_xy(prior), 'prior', ratios[examples.tile_prior]),
                   (utils.cxcy_to_xy(decoded), 'prediction', f'{examples.tile_classes[label]} {score:.2f}'))

    numbered = torch.arange(counts[0] * size ** 2).view(counts[0], size, size)  # (24, 5, 5)
    for x, rows in ((1, numbered.permute(1, 2, 0).reshape(-1, 4)), (33, numbered.reshape(-1, 4))):  # (150, 4)
        channels, tiles = (rows[prior_row] // size ** 2).tolist(), (rows[prior_row] % size ** 2).tolist()
        for i, (channel, tile) in enumerate(zip(channels, tiles)):
            block(axes, x + 7 * i, 67.5, 7, 6, f'tile {tile}\n{offset_names[channel % 4]}',
                  (colors[channel // 4], 0.3 + 0.2 * (tile - tiles[0])))  # a shade for each tile
    return rendered(drawing)


@figure('receptive_fields.svg')
def draw_receptive_fields():
    """For each feature map, how far its predictions see, and how large its priors are."""
    fig, [axes] = panels(1, 1, 3.6)
    fields = [field for _, field in examples.receptive_fields().values()]
    for i, (field, priors) in enumerate(zip(fields, examples.priors_by_map().values())):
        sides = 300 * priors[..., 2:]
        axes.barh(i, field, 0.7, color=('faint', 0.45))
        axes.barh(i, sides.max() - sides.min(), 0.35, sides.min(), color='prior')
        axes.text(field + 8, i, field, va='center', fontsize=small)
    axes.axvline(300, color='ink', linestyle='--', linewidth=1.2)
    axes.text(306, -0.75, 'width of the image: 300', fontsize=small)
    axes.set(yticks=range(6), yticklabels=utils.feature_maps, ylim=(5.6, -1.1), xlim=(0, 960),
             xlabel='pixels of the image')
    axes.legend(axes.containers[:2], ('seen by a prediction', 'sides of the priors'), loc='upper right',
                bbox_to_anchor=(1, 0.9), fontsize=small)
    return fig


@figure('pipeline.svg')
def draw_pipeline():
    """What happens to images in training, and in use."""
    drawing, axes = canvas(74)
    training = {'create_data_lists': 'lists of images and objects', 'PascalVOCDataset, transform': 'with augmentation',
                'collate_fn': 'images (N, 3, 300, 300)', 'SSD300': 'locs (N, 8732, 4)\nscores (N, 8732, n_classes)',
                'MultiBoxLoss': 'the loss, a number', 'optimizer': 'better weights', 'save_checkpoint': ''}
    use = {'an image': '', 'to_rgb': 'RGB, upright', 'resize, to_input': 'image (1, 3, 300, 300)',
           'SSD300': 'locs (1, 8732, 4)\nscores (1, 8732, n_classes)', 'detect_objects': 'boxes, labels, scores',
           'draw_objects': ''}
    for x, title, steps in ((4, 'training', training), (34, 'use', use)):
        write(axes, x + 13, 2, title, weight='bold', fontsize=13)
        for i, (name, result) in enumerate(steps.items()):
            y = 4.5 + 10.6 * i
            block(axes, x, y, 26, 4, name, ('faint', 0.25))
            if i + 1 < len(steps):
                arrow(axes, (x + 2, y + 4), (x + 2, y + 10.6))
            write(axes, x + 3.5, y + 7.1, result, ha='left')
    for start, end, x in (((4, 27.7), (4, 48.9), 2.5), ((30, 70.1), (60, 38.3), 62.5)):
        axes.plot([start[0], x, x], [start[1], start[1], end[1]], color='ink', linewidth=1.5)
        arrow(axes, (x, end[1]), end)
    write(axes, 1.3, 38.3, 'boxes, labels', rotation=90)
    write(axes, 46, 68.8, 'weights')
    return drawing


# ---------------------------------------------------------------------------------------------------- Boxes and priors

@figure('jaccard.svg')
def draw_jaccard():
    """The Jaccard index of two boxes, and pairs of boxes with other indices."""
    first, second = examples.jaccard_boxes
    areas = [box.prod().item() for box in utils.xy_to_cxcy(examples.jaccard_boxes)[:, 2:]]
    intersection = utils.find_intersection(first[None], second[None]).item()
    union = sum(areas) - intersection
    index = utils.find_jaccard_overlap(first[None], second[None]).item()
    common = torch.cat([torch.max(first[:2], second[:2]), torch.min(first[2:], second[2:])])  # (4)
    drawing, axes = canvas(42)

    def draw_pair(pair, x, y, scale, *filled):
        """Two boxes, drawn at (x, y) and to scale, and others of which only the inside is seen."""
        offset = torch.tensor([x, y] * 2)
        for box in filled:
            for color in ('white', ('prediction', 0.7)):  # white: lest two boxes give a darker color
                outline(axes, box * scale + offset, 'none', facecolor=color, linewidth=0)
        for box, color in zip(pair, ('object', 'prior')):
            outline(axes, box * scale + offset, color)

    draw_pair((first, second), 2, 4, 4)
    write(axes, 5.5, 13, f'area {areas[0]:.0f}', color='object')
    write(axes, 22, 10.5, f'area {areas[1]:.0f}', color='prior')
    for x_min, y_min, x_max, y_max in examples.jaccard_boxes.tolist():
        write(axes, 2 + 4 * x_min, 2.8 + 4 * y_min, f' ({x_min:.0f}, {y_min:.0f})', ha='left')
        write(axes, 2 + 4 * x_max, 5.2 + 4 * y_max, f'({x_max:.0f}, {y_max:.0f}) ', ha='right')
    draw_pair((first, second), 30.5, 1.6, 1.7, common)
    axes.plot([29.5, 52], [10.6, 10.6], color='ink', linewidth=1.5)
    draw_pair((first, second), 30.5, 12.6, 1.7, first, second)
    write(axes, 42, 5, f'intersection {intersection:.0f}', ha='left')
    write(axes, 42, 16, f'union {areas[0]:.0f} + {areas[1]:.0f} − {intersection:.0f} = {union:.0f}', ha='left')
    write(axes, 54, 10.6, f'= {index:.1f}', ha='left', fontsize=14, weight='bold')

    for i, overlap in enumerate((0.1, 0.3, 0.5, 0.7, 0.9)):
        shift = 1 - (2 * overlap / (1 + overlap)) ** 0.5  # of a square by this part of its side, right and down
        pair = torch.tensor([[0, 0, 1, 1], [shift, shift, 1 + shift, 1 + shift]])
        index = utils.find_jaccard_overlap(pair[:1], pair[1:]).item()
        draw_pair(pair, 6.4 + 12.8 * i - 3.5 * (1 + shift), 26, 7)
        write(axes, 6.4 + 12.8 * i, 40, f'{index:.1f}', fontsize=13, weight='bold')
    return drawing


@figure('log_sizes.svg')
def draw_log_sizes():
    """How far sizes of a quarter to four times the prior's are apart, with a logarithm and without."""
    fig, panes = panels(1, 2, 4)
    ratios, marked = torch.linspace(0.2, 4.2, 200), torch.tensor([1 / 4, 1 / 2, 1, 2, 4])  # of an object's width
    for axes, title, function in (
            (panes[0], 'difference $(w - \\hat w) / \\hat w$', lambda ratios: ratios - 1),
            (panes[1], 'logarithm $g_w = 5 \\ln (w / \\hat w)$',
             lambda ratios: utils.cxcy_to_gcxgcy(ratios.unsqueeze(1).expand(-1, 4), torch.ones(4))[:, 2])):
        axes.plot(ratios, function(ratios), color='ink')
        for ratio, value, name in zip(marked.tolist(), function(marked).tolist(), ('¼', '½', '1', '2', '4')):
            axes.plot([0, ratio], [value, value], color='prediction', linewidth=1, linestyle=':')
            axes.plot(ratio, value, 'o', color='prediction', markersize=7)
            axes.annotate(name, (ratio, value), (6, -4), textcoords='offset points', va='top')
        axes.margins(y=0.08)
        axes.set(title=title, xlabel='$w / \\hat w$', xlim=(0, 4.7), yticks=function(marked).tolist())
        axes.yaxis.set_major_formatter('{x:.2f}')
        axes.tick_params('y', labelsize=small)
    return fig


@figure('matching_steps.svg')
def draw_matching_steps():
    """Three objects and six priors, and how they are matched, step by step."""
    names, objects, priors = examples.matching_names, examples.matching_boxes, examples.matching_priors
    labels = torch.arange(1, len(names) + 1)
    overlaps = utils.find_jaccard_overlap(objects, utils.cxcy_to_xy(priors))  # (3, 6)
    _, classes = match(objects, labels, priors)  # (6)
    _, own_classes = match(objects, labels, priors, threshold=1)  # (6); only the objects' own priors reach it
    own = (own_classes == labels.unsqueeze(1)).int().argmax(dim=1)  # (3)
    colors = ('object', series[3], series[4])
    tints = ['white', *((color, 0.5) for color in colors)]  # of background, and of each object
    best = F.one_hot(overlaps.argmax(dim=0), len(objects)).T  # (3, 6); 1: the prior's best object
    taken = F.one_hot(own, len(priors))  # (3, 6); 1: the object's own prior
    drawing, axes = canvas(78)

    for x, title, prior_colors in ((2, 'three objects, six priors', ['prior'] * len(priors)),
                                   (34, 'matched', [('faint', *colors)[label] for label in classes.tolist()])):
        write(axes, x + 14, 1.8, title, weight='bold')
        block(axes, x, 3.5, 28, 28, edge='faint')
        offset = torch.tensor([x, 3.5] * 2)
        for box, name, color in zip(objects * 28 + offset, names, colors):
            outline(axes, box, color, facecolor=(color, 0.25), linewidth=1)
            c_x, c_y, _, h = utils.xy_to_cxcy(box).tolist()
            write(axes, c_x, c_y + {'cat': h / 2 + 1, 'dog': -h / 2 - 1.2, 'ball': 0}[name], name)
        for i, (prior, color) in enumerate(zip(priors, prior_colors)):
            gap = 0.35 * (i % 2)  # every other one a little smaller, lest edges of neighbors hide each other
            outline(axes, utils.cxcy_to_xy(prior) * 28 + offset + torch.tensor([gap, gap, -gap, -gap]), color,
                    linewidth=1.5 if color == 'faint' else 2.5)
            write(axes, *(prior[:2] * 28 + offset[:2]).tolist(), str(i + 1), color=color, fontsize=13, weight='bold')

    for y, title, marked in (
            (36.5, 'Step 1: each prior gets the object that it overlaps most.', best),
            (54.5, 'Step 2: each object chooses a prior of its own, the largest overlap first.\n'
             f'Prior {own[0] + 1} is taken, so the {names[1]} chooses its next best, prior {own[1] + 1}.', taken)):
        write(axes, 2, y, title, ha='left', va='bottom')
        for j in range(len(priors)):
            write(axes, 12.5 + 9 * j, y + 1.8, f'prior {j + 1}', color='prior')
        for i, row in enumerate(overlaps.tolist()):
            write(axes, 2, y + 4.7 + 2.8 * i, names[i], ha='left', color=colors[i], weight='bold')
            fills = [tints[i + 1] if mark else 'white' for mark in marked[i].tolist()]
            table(axes, 8, y + 3.3 + 2.8 * i, [[f'{value:.2f}' for value in row]], (9, 2.8), [fills])
    for i, (wanted, got) in enumerate(zip(overlaps.argmax(dim=1).tolist(), own.tolist())):
        if wanted != got:
            x, y = 8 + 9 * wanted, 57.8 + 2.8 * i  # the cell in the second table
            outline(axes, (x, y, x + 9, y + 2.8), 'wrong', linestyle='--')
    write(axes, 2, 70, 'Step 3: other priors that overlap their object by less than 0.5 are background.',
          ha='left', va='bottom')
    table(axes, 8, 71.2, [[('back-\nground', *names)[label] for label in classes.tolist()]], (9, 5),
          [[tints[label] for label in classes.tolist()]])
    return drawing


# --------------------------------------------------------------------------------------------------- Loss and learning

@figure('smooth_l1.svg')
def draw_smooth_l1():
    """Smooth L1 between L1 and L2, and its gradient."""
    error = torch.linspace(-3, 3, 301, requires_grad=True)
    smooth = F.smooth_l1_loss(error, torch.zeros_like(error), reduction='none')  # (301)
    gradient, = torch.autograd.grad(smooth.sum(), error)  # (301)
    error, smooth = error.detach(), smooth.detach()
    fig, (left, right) = panels(1, 2, 3)
    left.plot(error, error ** 2 / 2, color='faint', linestyle='--', label='L2: $x^2 / 2$')
    left.plot(error, error.abs(), color='faint', linestyle=':', label='L1: $|x|$')
    left.plot(error, smooth, color='prediction', linewidth=3, label='Smooth L1')
    left.set(title='loss', xlabel='error $x$', ylim=(-0.1, 4.5))
    left.legend(fontsize=small, loc='upper center')
    right.plot(error, gradient, color='prediction', linewidth=3)
    right.set(title='gradient of Smooth L1', xlabel='error $x$', yticks=(-1, 0, 1))
    return fig


@figure('hard_negatives.svg')
def draw_hard_negatives():
    """The share of a test image's negatives' loss that the hardest have, before and after the demo's training."""
    (finished, _), (_, unfinished, _) = trained.detector(), trained.start()
    criterion = MultiBoxLoss(utils.create_prior_boxes())
    images, boxes, labels, _ = collate_fn([trained.test_set()[0]])
    _, true_classes = criterion.match(boxes, labels)  # (1, 8732, 4), (1, 8732)
    n_positives = (true_classes > 0).sum().item()
    n_hard = criterion.neg_pos_ratio * n_positives
    fig, [axes] = panels(1, 1, 3.6)
    rows = []
    for state, model, color, named_at in (('before', unfinished, 'faint', 4000),
                                          ('after', finished, 'prediction', 1500)):
        with torch.no_grad():
            _, predicted_scores = model(images)  # (1, 8732, 4), (1, 8732, n_classes)
        losses = F.cross_entropy(predicted_scores[0], true_classes[0], reduction='none')  # (8732)
        negatives = losses[true_classes[0] == 0].sort(descending=True).values  # (n_negatives)
        parts = negatives[:n_hard], negatives[n_hard:]
        rows.append((state, n_positives, n_hard, *(round(part.sum().item(), 1) for part in parts)))
        shares = negatives.cumsum(dim=0) / negatives.sum()  # (n_negatives)
        axes.plot(range(1, len(negatives) + 1), shares, color=color, linewidth=2.5)
        axes.plot(n_hard, shares[n_hard - 1], 'o', color=color, markersize=9, markeredgecolor='ink', zorder=3)
        axes.annotate(f'{shares[n_hard - 1]:.0%}', (n_hard, shares[n_hard - 1]), (10, -4), textcoords='offset points',
                      va='center', fontsize=14, weight='bold')
        axes.text(named_at + 200, shares[named_at], f'{state} training', va='top')
    axes.axvline(n_hard, color='ink', linewidth=1, linestyle='--')
    axes.text(n_hard, 1.04, f'the cut: {n_hard} of {len(negatives)}, {n_hard / len(negatives):.0%}', fontsize=small,
              va='bottom')
    axes.set(xlabel='negatives kept, the hardest first', ylabel="share of the negatives' loss",
             xlim=(0, len(negatives)), ylim=(-0.06, 1.03), xticks=(0, 2000, 4000, 6000, len(negatives)))
    axes.yaxis.set_major_formatter('{x:.0%}')
    columns = 'training', 'positives', 'hard_negatives', 'hard_loss', 'ignored_loss'
    trained.write_table('hard_negatives.csv', columns, rows)
    return fig


@figure('learning_rate.svg')
def draw_learning_rate():
    """The learning rate of train.py over the first steps, and over the epochs."""
    steps_per_epoch = math.ceil(16551 / train.batch_size)  # VOC 07+12
    fig, (first, whole) = panels(1, 2, 3)
    all_steps = range(0, train.epochs * steps_per_epoch, steps_per_epoch // 10)
    for axes, steps, unit in ((first, range(0, 1001, 10), 1), (whole, all_steps, steps_per_epoch)):
        rates = torch.tensor([train.lr * train.warm_up_and_decay(step, steps_per_epoch, train.warm_up,
                                                                 train.decay_lr_at, train.decay_lr_to)
                              for step in steps])
        at = torch.tensor(steps) / unit
        axes.plot(at, 2 * rates, color='faint', linestyle='--', label='biases')
        axes.plot(at, rates, color='ink', linewidth=2.5, label='all other weights')
    first.set(title='the first steps', xlabel='step', ylabel='learning rate', yticks=(0, train.lr, 2 * train.lr))
    first.legend(fontsize=small, loc='lower right', handlelength=1.5)
    whole.set(title='all epochs', yscale='log', xlabel='epoch', ylim=(train.lr / 200, 4 * train.lr),
              xticks=(0, *train.decay_lr_at, train.epochs))
    whole.tick_params('x', labelsize=small)
    return fig


def plot_losses(axes, steps, rows):
    """Plot the losses in rows of a log over these steps."""
    for column, color, name in (('loss', 'ink', 'loss'), ('conf_loss', 'prediction', 'confidence loss'),
                                ('loc_loss', 'prior', 'localization loss')):
        if column in rows[0]:
            axes.plot(steps, [float(row[column]) for row in rows], color=color, label=name)
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.legend(fontsize=small)


@figure('loss_curve.svg')
def draw_loss_curve():
    """The loss of the demo's training, and its two parts."""
    rows = trained.read_table('learning.csv')
    n_batches = int(rows[-1]['batch'])
    fig, [axes] = panels(1, 1, 3.4)
    plot_losses(axes, [int(row['epoch']) * n_batches + int(row['batch']) for row in rows], rows)
    axes.set(xlabel='step', ylabel='loss')
    return fig


@figure('voc_2008.svg')
def draw_voc_2008():
    """The losses and the mAP of a training on VOC 2008, from random weights, over its epochs."""
    rows = trained.read_table('voc_2008.csv')
    fig, (losses, precision) = panels(1, 2, 3.4)
    plot_losses(losses, [int(row['epoch']) + 1 for row in rows], rows)
    losses.set(xlabel='epoch', title='loss')
    measured = [(int(row['epoch']) + 1, float(row['mAP'])) for row in rows if row['mAP']]
    precision.plot(*zip(*measured), 'o-', color='object')
    precision.set(xlabel='epoch', title='mAP', xlim=(0, 62), ylim=(0, 0.1))
    return fig


@figure('voc_2008_imagenet.svg')
def draw_voc_2008_imagenet():
    """The losses of a training on VOC 2008, from ImageNet's weights, over its epochs."""
    rows = trained.read_table('voc_2008_imagenet.csv')
    last_batch = int(rows[-1]['batch'])
    fig, [axes] = panels(1, 1, 2.8)
    plot_losses(axes, [int(row['epoch']) + int(row['batch']) / last_batch for row in rows], rows)
    axes.set(xlabel='epochs')
    return fig


# ---------------------------------------------------------------------------------------------------------- Evaluation

@figure('average_precision.svg')
def draw_average_precision():
    """Eight detections, their precision over recall, and the average precision."""
    true_positives, n_objects = examples.true_positives, examples.n_objects
    found = true_positives.cumsum(0)  # (8)
    precisions, recalls = found / torch.arange(1, len(found) + 1), found / n_objects  # (8), (8)
    rows = {'by score': [str(rank) for rank in range(1, len(found) + 1)],
            '': ['TP' if is_true else 'FP' for is_true in true_positives.tolist()],
            'precision': [f'{value:.2f}' for value in precisions.tolist()],
            'recall': [f'{value:.1f}' for value in recalls.tolist()]}
    fills = [('object' if is_true else 'wrong', 0.35) for is_true in true_positives.tolist()]
    drawing, axes = canvas(58)
    for i, (name, texts) in enumerate(rows.items()):
        write(axes, 1, 2.5 + 3 * i, name, ha='left')
        table(axes, 11, 1 + 3 * i, [texts], (6.4, 3), [fills])
    chart = drawing.add_axes((0.12, 0.11, 0.85, 0.62))
    tenths = torch.arange(11)
    reached = found * 10 >= tenths.unsqueeze(1) * n_objects  # (11, 8)
    best = precisions.where(reached, 0).max(dim=1).values  # (11)
    chart.step(tenths / 10, best, color='prediction', linewidth=1, linestyle='--')
    chart.plot(recalls, precisions, color='faint', linewidth=1)
    for marker, drawn, color in (('o', true_positives, 'object'), ('X', ~true_positives, 'wrong')):
        chart.plot(recalls[drawn], precisions[drawn], marker, color=color, markersize=7, zorder=3)
    chart.plot(tenths / 10, best, 'o', color='prediction', markersize=13, markerfacecolor='none', markeredgewidth=2)
    chart.text(0.02, 0.2, f'open circles: best precision at this recall\nor beyond, 0 if there is none\n\n'
               f'AP, the mean of the 11 open circles: {utils.average_precision(true_positives, n_objects):.3f}',
               fontsize=small, va='center')
    chart.set(xlabel='recall', ylabel='precision', xlim=(-0.03, 1.03), ylim=(-0.06, 1.1), xticks=tenths / 10)
    return drawing
