"""Every key of a training config with its unit, before any recipe sets it.

A recipe (`v1.py`, `v2.py`, ...) starts from here and changes what its paper states; `datasets.py` holds what
a data set needs. Nothing derived is stored: steps, scaled learning rates and channel counts are computed when the
run starts, so an override never leaves a stale value. A key that is not here does not exist: overriding it is an error.
"""

import ml_collections
from ml_collections.config_dict import placeholder


def get_config() -> ml_collections.ConfigDict:
    """A complete config: MobileNetV2 on the embedded digits, plain SGD."""
    config = ml_collections.ConfigDict()
    config.name = "mobilenet_v2"  # of the run; the default workdir is runs/NAME
    config.seed = 0  # of initialisation, shuffling, augmentation, dropout
    config.parallel = "jit"  # jit: statistics over the global batch | pmap: per-device statistics
    config.init = ""  # initial weights: a file, the workdir of a run, or a name to download; empty: random
    config.init_name = ""  # the model in that file, as timm/tf_mobilenetv3_large_100, where its tensors do not say it

    model = config.model = ml_collections.ConfigDict()
    # Where name, width, convention or data.image_size, crop_share, interpolation, squash, mean or std is none, it is
    # that of the card of `init`, as in transfer.py.
    model.name = "mobilenet_v2"  # a name of `python -m mobilenet_jax.summary --list`
    model.width = 1.0  # width multiplier, by the rule of the model's paper and convention
    model.convention = "keras"  # keras | timm | timm_tf | torchvision: padding, epsilon, width rule, head
    model.num_classes = placeholder(int)  # none: as many as the data set has
    model.lowering = "auto"  # auto: fast formulations of the same network | plain: as a textbook writes it
    model.depthwise_impl = "auto"  # auto | feature_group_count | shifted_sum
    model.dtype = "float32"  # of the computation: float32 | bfloat16; parameters and statistics are float32
    model.remat = False  # recompute the blocks in the backward pass: less memory, about a third more time
    model.stride_one = ()  # which stride-2 rows, counted from the stem (0), run at stride 1: small images
    model.output_stride = placeholder(int)  # 8 | 16 | 32: later strides become dilations; none: as the table
    model.activation = placeholder(str)  # relu | relu6 | hard_swish | gelu everywhere; none: as the table has it
    model.hard_swish_from = placeholder(int)  # first block with hard-swish, those before it ReLU; none: the table's
    model.projection_activation = placeholder(str)  # linear | relu6; none: linear, the paper's bottleneck
    model.shortcut = placeholder(str)  # bottleneck | expansion | none (the string); unset: bottleneck
    model.sum_activation = placeholder(str)  # linear | relu6, behind a residual's sum; none: linear
    model.expansion = placeholder(float)  # expansion factor of every row that expands; none: the table's
    model.se_ratio = placeholder(float)  # squeeze-excite width over expanded width; 0 removes; none: table
    model.se_rounding = placeholder(str)  # div8 | int; none: div8
    model.se_gate = placeholder(str)  # hard_sigmoid | sigmoid | hard_swish; none: hard_sigmoid
    # regular | separable | linear_bottleneck | inverted_residual (1801.04381 Fig. 2); none: the table's
    model.block_form = placeholder(str)
    model.shallow = placeholder(bool)  # leave out the longest run of equal blocks; none: all stay
    model.head_width = placeholder(int)  # channels of the last layer before the classifier; none: table
    model.init = "he"  # he (torchvision, timm) | slim (truncated normal)
    model.dropout = 0.2  # share of the classifier's input dropped
    model.drop_path = 0.0  # stochastic depth: drop rate of the last residual block, rising linearly
    model.drop_path_flat = False  # the same drop rate for every residual block instead
    model.bn_decay = 0.9  # share of the running statistics kept at each step
    model.bn_epsilon = placeholder(float)  # none: the convention's

    data = config.data = ml_collections.ConfigDict()
    data.source = "digits"  # digits | tfds:NAME | folder | fake:N
    data.data_dir = ""  # of tfds: the folder that holds the prepared sets; empty: TFDS' own default
    data.path = ""  # of folder: the folder of train/CLASS/*.jpg, or of CLASS/*.jpg
    data.num_classes = 1000  # of fake alone
    data.image_size = 32  # pixels, height and width, of training and evaluation
    data.batch_size = 64  # images a step, over all devices and hosts
    data.eval_batch_size = 256  # images an evaluation step, over all devices and hosts
    data.on_error = "stop"  # stop | skip: what training does at an unreadable image; evaluation stops
    data.holdout = 0.0  # share of train kept out of training; above 0 it is what evaluation sees
    data.workers = 0  # Grain worker processes; 0: threads of this process
    data.crop = "resize"  # of training images: inception | pad (shift by up to data.pad) | resize
    data.area_range = (0.08, 1.0)  # inception crop: share of the image's area
    data.aspect_range = (3 / 4, 4 / 3)  # inception crop: width over height
    data.pad = 4  # pixels, of crop="pad"
    data.flip = False  # horizontal flip of half the training images
    data.color_jitter = 0.0  # strength of brightness, contrast and saturation changes: factor in 1 +- strength
    data.randaugment_layers = 0  # operations an image; 0: none
    data.randaugment_magnitude = 9  # 0..10
    data.randaugment_probability = 0.5  # of each operation
    data.erasing = 0.0  # probability of random erasing
    data.mixup = 0.0  # alpha of Beta(alpha, alpha); 0: off
    data.cutmix = 0.0  # alpha of Beta(alpha, alpha); 0: off; with mixup, one of the two is drawn for each step
    data.mix_probability = 1.0  # share of the steps that mix at all
    data.crop_share = 1.0  # evaluation: centre crop's side over the resized shorter side
    data.interpolation = "bilinear"  # bilinear | bicubic, antialiased | nearest (inception crops: bilinear)
    data.squash = False  # evaluation: resize both sides alike, whatever the image's aspect, as Keras does
    data.mean = (127.5, 127.5, 127.5)  # grey levels, 0..255
    data.std = (127.5, 127.5, 127.5)  # grey levels

    train = config.train = ml_collections.ConfigDict()
    train.epochs = 10.0  # passes over the training set; may be a fraction
    train.steps = placeholder(int)  # instead of epochs, where set
    train.label_smoothing = 0.0
    train.accumulate = 1  # micro-batches a step is computed in, one after the other
    train.freeze_stats = False  # batch norm uses its running statistics in training too, and keeps them
    # Passes over the training images that measure the batch-norm statistics anew at the run's end; 0: the running ones
    # stay. May be a fraction.
    train.recompute_stats_epochs = 0.0
    train.cache_features = False  # run every image through the network once and train the classifier on what comes out
    train.log_every_steps = 10
    train.diagnose_every_steps = 0  # count dead depthwise filters and variances near 0 in the metrics; 0: never
    train.eval_every_epochs = 1.0
    train.save_every_epochs = 1.0
    train.keep_checkpoints = 2  # the newest N

    optim = config.optim = ml_collections.ConfigDict()
    optim.name = "sgd"  # rmsprop (as TensorFlow computes it) | sgd | adamw
    optim.lr_per_256 = 0.1  # peak learning rate for 256 images a step; scaled linearly by the batch size
    optim.schedule = "cosine"  # cosine (to 0) | staircase | constant
    optim.warmup_epochs = 0.0  # linear from 0
    optim.decay_factor = 0.98  # staircase: factor ...
    optim.decay_epochs = 1.0  # ... every so many epochs, counted from the first step
    optim.momentum = 0.9  # rmsprop, sgd
    optim.nesterov = False  # sgd
    optim.rms_decay = 0.9  # rmsprop
    optim.beta1 = 0.9  # adamw
    optim.beta2 = 0.999  # adamw
    optim.epsilon = 1e-8  # adamw: beside the root; rmsprop: inside it
    optim.l2 = 0.0  # L2 in the loss: l2 * sum(w^2) / 2
    optim.weight_decay = 0.0  # decoupled, times the learning rate
    # (pattern, factor) on parameter paths, first match wins: scales l2 and weight_decay
    optim.decay_rules = (("kernel$", 1.0), (".*", 0.0))
    optim.freeze = ()  # patterns of parameter paths that are not trained
    # Epochs after which what `freeze` names is trained too; until then batch norm keeps its statistics. none: never.
    optim.freeze_epochs = placeholder(float)
    optim.layer_decay = 1.0  # each layer's learning rate over that of the layer above it; the classifier has all of it
    optim.clip_norm = 0.0  # largest global gradient norm; 0: no clipping

    config.ema = ml_collections.ConfigDict()
    config.ema.decay = 0.0  # of the average of parameters and statistics, min(decay, (1 + t) / (10 + t)); 0: none
    return config.lock()
