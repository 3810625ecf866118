"""All keys of a training config, with their units and default values.

A recipe (`v1.py`, `v2.py`, ...) starts from this config and sets the values of its paper; `datasets.py` sets the values
that a data set needs. Nothing derived is stored: steps, scaled learning rates and channel counts are computed when the
run starts, so an override never leaves a stale value. It is an error to override a key that is not listed here.
"""

import ml_collections
from ml_collections.config_dict import placeholder


def get_config() -> ml_collections.ConfigDict:
    """A complete config: MobileNetV2 on the embedded digits, plain SGD."""
    config = ml_collections.ConfigDict()
    config.name = "mobilenet_v2"  # name of the run; the default workdir is runs/NAME
    config.seed = 0  # for initialisation, shuffling, augmentation and dropout
    config.parallel = "jit"  # batch-norm statistics over: jit: the global batch | pmap: the batch of each device
    config.init = ""  # initial weights: a file, the workdir of a run, or a name to download; empty: random
    config.init_name = ""  # the model in that file, such as timm/tf_mobilenetv3_large_100, if its tensors fit several
    config.init_select = ""  # the network in a checkpoint that has several, such as state_dict; empty: averaged weights
    config.init_classifier = "keep"  # keep | drop: the last layers start afresh, whatever the file has there

    # If one of name, width, convention, data.image_size, crop_share, interpolation, squash, mean and std is none, its
    # value is taken from the card of the weights in `init`; transfer.py uses this.
    model = config.model = ml_collections.ConfigDict()
    model.name = "mobilenet_v2"  # a name that `python -m mobilenet_jax.summary --list` prints
    model.width = 1.0  # width multiplier; the paper and the convention of the model define its rounding
    model.convention = "keras"  # keras | timm | timm_tf | torchvision: padding, epsilon, width rule, head
    model.num_classes = placeholder(int)  # none: the number of classes of the data set
    model.in_channels = placeholder(int)  # channels of an image; none: 3, which all data sources give
    model.lowering = "auto"  # auto: the fastest program for the platform | plain: the program of a textbook
    model.depthwise_impl = "auto"  # auto | feature_group_count | shifted_sum
    model.dtype = "float32"  # float32 | bfloat16, for computation; parameters and statistics are always float32
    # default | high | highest, of convolutions and matrix products in float32. On a TPU, default rounds their inputs to
    # bfloat16 (one pass), high takes three passes, highest six; on new GPUs default is TF32. A CPU is always exact.
    model.precision = "default"
    model.remat = False  # recompute blocks in the backward pass: less memory, about a third more time
    model.stride_one = ()  # stride-2 rows, counted from the stem (0), that get stride 1, for small images
    model.output_stride = placeholder(int)  # 8 | 16 | 32: later strides become dilations; none: strides of the table
    model.activation = placeholder(str)  # relu | relu6 | hard_swish | gelu everywhere; none: the table's
    model.hard_swish_from = placeholder(int)  # first block with hard-swish, ReLU before it; none: the table's
    model.projection_activation = placeholder(str)  # linear | relu6, after the projection; none: linear
    model.shortcut = placeholder(str)  # bottleneck | expansion | 'none' (no shortcuts); none: bottleneck
    model.sum_activation = placeholder(str)  # linear | relu6, after the sum of a residual; none: linear
    model.expansion = placeholder(float)  # expansion factor of every row that expands; none: the table's
    model.se_ratio = placeholder(float)  # squeeze-excite width over expanded width; 0: without; none: the table's
    model.se_rounding = placeholder(str)  # div8 | int; none: div8
    model.se_gate = placeholder(str)  # hard_sigmoid | sigmoid | hard_swish; none: hard_sigmoid
    # regular | separable | linear_bottleneck | inverted_residual (1801.04381 Fig. 2); none: the table's
    model.block_form = placeholder(str)
    model.shallow = placeholder(bool)  # leave out the longest run of equal blocks; none: keep all
    model.head_width = placeholder(int)  # channels of the last layer before the classifier; none: the table's
    model.init = "he"  # initial kernels: he (torchvision, timm) | slim (truncated normal)
    model.dropout = 0.2  # share of the classifier's input that is dropped in training
    model.drop_path = 0.0  # stochastic depth: drop rate of the last residual block, rising linearly
    model.drop_path_flat = False  # the same drop rate for every residual block instead
    model.bn_decay = 0.9  # share of the running statistics that each step keeps
    model.bn_epsilon = placeholder(float)  # none: the value of the convention

    data = config.data = ml_collections.ConfigDict()
    data.source = "digits"  # digits | tfds:NAME | folder | fake:N
    data.data_dir = ""  # for tfds: the folder of the prepared data sets; empty: the default of TFDS
    data.path = ""  # for folder: a folder with train/CLASS/*.jpg, or with CLASS/*.jpg
    data.num_classes = 1000  # for fake: the number of classes
    data.image_size = 32  # pixels, height and width, of training and evaluation
    data.batch_size = 64  # images per step, over all devices and hosts
    data.eval_batch_size = 256  # images per evaluation step, rounded up to a multiple of all devices
    data.on_error = "stop"  # stop | skip, when training meets an unreadable image; evaluation always stops
    data.holdout = 0.0  # share of the training images held out; if above 0, evaluation uses these images
    data.workers = 0  # number of Grain worker processes; 0: threads of this process
    # exact | fast: decode a JPEG that is much larger than needed at a half, a quarter or an eighth of its size
    data.decode = "exact"
    # resized: keep training images in memory as JPEGs whose shorter side is at most 2 * image_size, for
    # crop="inception"; empty: keep none
    data.cache = ""
    data.crop = "resize"  # of training images: inception | pad (shift by at most data.pad) | resize
    data.area_range = (0.08, 1.0)  # inception crop: share of the image's area
    data.aspect_range = (3 / 4, 4 / 3)  # inception crop: width over height
    data.pad = 4  # pixels, for crop="pad"
    data.flip = False  # horizontal flip of half the training images
    data.color_jitter = 0.0  # brightness, contrast and saturation change by factors in 1 +- this
    data.randaugment_layers = 0  # operations per image; 0: none
    data.randaugment_magnitude = 9  # strength of the operations, 0..10
    data.randaugment_probability = 0.5  # of each operation
    data.erasing = 0.0  # probability of random erasing
    data.mixup = 0.0  # alpha of Beta(alpha, alpha); 0: off
    data.cutmix = 0.0  # alpha of Beta(alpha, alpha); 0: off; if mixup is on too, each step draws one of them
    data.mix_probability = 1.0  # share of the steps that use mixup or cutmix
    data.crop_share = 1.0  # evaluation: side of the centre crop over the shorter side of the resized image
    data.interpolation = "bilinear"  # bilinear | bicubic, antialiased | nearest (inception crops: bilinear)
    data.squash = False  # evaluation: resize to a square and ignore the aspect ratio, as Keras does
    data.mean = (127.5, 127.5, 127.5)  # grey levels, 0..255
    data.std = (127.5, 127.5, 127.5)  # grey levels, 0..255

    train = config.train = ml_collections.ConfigDict()
    train.epochs = 10.0  # passes over the training set; may be a fraction
    train.steps = placeholder(int)  # number of steps; if set, it replaces epochs
    train.label_smoothing = 0.0  # share of the label spread over all classes
    train.accumulate = 1  # number of micro-batches that a step is split into
    train.freeze_stats = False  # use the running statistics in training too, and do not update them
    # Passes over the training images, at the end of the run, that measure the batch-norm statistics and replace the
    # running statistics; 0: keep the running statistics. May be a fraction.
    train.recompute_stats_epochs = 0.0
    train.cache_features = False  # compute the features of each image once, and train the classifier on them
    train.quantize = placeholder(str)  # int8: train the network as int8 kernels run it, from `init`; none: in float
    train.range_decay = 0.99  # int8: share of the range of each tensor that a step keeps
    train.freeze_ranges_epochs = 1.0  # int8: epochs at the end in which the ranges stay as they are
    train.log_every_steps = 10  # steps
    train.diagnose_every_steps = 0  # steps between counts of dead depthwise filters in the metrics; 0: never
    train.eval_every_epochs = 1.0  # epochs; 0: only at the end
    train.save_every_epochs = 1.0  # epochs between checkpoints; 0: only at the end
    train.keep_checkpoints = 2  # number of newest checkpoints to keep

    # Learning from a teacher: the loss is (1 - weight) times that of the labels plus weight times that of the teacher.
    train.distill = ml_collections.ConfigDict()
    train.distill.weights = ""  # the teacher: a file, the workdir of a run, or a name to download; empty: no teacher
    train.distill.name = ""  # the model in that file, such as timm/tf_mobilenetv3_large_100, if its tensors fit several
    # Images that the teacher sees. teacher: with the mean, std and size of its card | student: as the student sees them
    train.distill.prepare = "teacher"
    train.distill.divergence = "kl"  # kl | js (Jensen-Shannon), between the answers of the teacher and of the student
    train.distill.temperature = 1.0  # T in softmax(logits / T); the teacher's loss is multiplied by T^2
    train.distill.weight = 1.0  # of the teacher's loss; 1: the labels are not used

    optim = config.optim = ml_collections.ConfigDict()
    optim.name = "sgd"  # rmsprop (as TensorFlow computes it) | sgd | adamw
    optim.lr_per_256 = 0.1  # peak learning rate for 256 images per step; scaled linearly with the batch size
    optim.schedule = "cosine"  # cosine (to 0) | staircase | constant
    optim.warmup_epochs = 0.0  # length of a linear warm-up from 0
    optim.decay_factor = 0.98  # staircase: the learning rate is multiplied by this ...
    optim.decay_epochs = 1.0  # ... each time this many epochs have passed since the first step
    optim.momentum = 0.9  # rmsprop, sgd: share of the momentum that each step keeps
    optim.nesterov = False  # sgd: Nesterov momentum
    optim.rms_decay = 0.9  # rmsprop: share of the mean square that each step keeps
    optim.beta1 = 0.9  # adamw: share of the mean that each step keeps
    optim.beta2 = 0.999  # adamw: share of the mean square that each step keeps
    optim.epsilon = 1e-8  # adamw: added to the root; rmsprop: added inside the root
    optim.l2 = 0.0  # the loss gets l2 * sum(w^2) / 2
    optim.weight_decay = 0.0  # decoupled from the gradient; multiplied by the learning rate
    # (pattern, factor) for parameter paths; the first match scales l2 and weight_decay
    optim.decay_rules = (("kernel$", 1.0), (".*", 0.0))
    optim.freeze = ()  # patterns of the parameter paths that are not trained
    # Epochs after which the parameters of `freeze` are trained too; until then the running statistics stay unchanged.
    # none: never.
    optim.freeze_epochs = placeholder(float)
    optim.layer_decay = 1.0  # learning rate of a layer over that of the next layer; the classifier has the full rate
    optim.clip_norm = 0.0  # clip the global gradient norm to this; 0: no clipping

    config.ema = ml_collections.ConfigDict()
    config.ema.decay = 0.0  # share of the average kept at step t: min(decay, (1 + t) / (10 + t)); 0: no average
    return config.lock()
