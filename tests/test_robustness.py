"""Nothing a user, a disk or a data set does loses their work."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
from conftest import draw_and_list, root
from kill_loop import runs, workers_of
from PIL import Image
from test_processes import command, no_gpu
from tiny import SpoiledPictures, TinyDetector
from torch.utils.data import DataLoader

import datasets
import eval as eval_script
import train
from datasets import EpochSampler, PascalVOCDataset, collate_fn, load_batches
from files import UserError, killed_worker, run
from model import SSD300, MultiBoxLoss
from utils import load_checkpoint, save_checkpoint


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Lists of 40 training pictures."""
    return draw_and_list(tmp_path_factory.mktemp('robust'), 40, 3)


# --------------------------------------------------------------------------------------------------------- Numbers

def copies(optimizer):
    """Of the weights, and of what the optimizer remembers of each."""
    weights = {id(p): p for group in optimizer.param_groups for p in group['params']}
    memories = {(id(p), name): values for p, state in optimizer.state.items() for name, values in state.items()}
    return {key: tensor.detach().clone() for key, tensor in (weights | memories).items() if tensor is not None}


def spoil(monkeypatch, how, n):
    """Make the loss or the gradient of the n-th batch infinite."""
    plain, count = MultiBoxLoss.parts, []

    def parts(self, predicted_locs, *args):
        count.append(1)
        loc_loss, conf_loss = plain(self, predicted_locs, *args)
        if len(count) == n:
            if how == 'loss':  # its gradient is finite
                loc_loss = loc_loss + float('inf')
            else:
                predicted_locs.register_hook(lambda gradient: gradient * float('inf'))
        return loc_loss, conf_loss
    monkeypatch.setattr(MultiBoxLoss, 'parts', parts)


optimizers = {'train.py': lambda model: train.make_optimizer(model, 1e-3, 0.9, 5e-4),
              'fused SGD': lambda model: torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, fused=True),
              'AdamW': lambda model: torch.optim.AdamW(model.parameters(), 1e-3),
              'Adagrad': lambda model: torch.optim.Adagrad(model.parameters(), 1e-3)}


@pytest.mark.parametrize('how, grad_clip, kind', [
    ('nan', None, 'train.py'), ('inf', 5., 'AdamW'), ('1e38', None, 'fused SGD'), ('loss', 5., 'train.py'),
    ('loss', None, 'Adagrad'), ('gradient', None, 'AdamW'), ('gradient', 5., 'train.py')])
def test_no_step_is_taken_with_a_loss_that_is_no_number(folder, tmp_path, monkeypatch, how, grad_clip, kind):
    """Two batches are fine, the third is not."""
    path = str(tmp_path / 'c.pth')
    dataset = PascalVOCDataset(folder, 'TRAIN', keep_difficult=True)
    sampler = EpochSampler(40, seed=0)
    sampler.set_epoch(1)
    third = [index for index, _ in sampler][8:12]
    if how in ('nan', 'inf', '1e38'):
        dataset = SpoiledPictures(dataset, third[1], float(how))
    else:
        spoil(monkeypatch, how, 3)
    model = TinyDetector(4)
    optimizer = optimizers[kind](model)
    save_checkpoint(path, 0, model, optimizer, dataset.label_map, seed=0)
    with open(path, 'rb') as file:
        checkpoint = file.read()
    after = []  # each step
    optimizer.register_step_post_hook(lambda *_: after.append(copies(optimizer)))
    with pytest.raises(UserError) as error:
        train.fit(model, optimizer, dataset, path, 2, batch_size=4, start_epoch=1, grad_clip=grad_clip)
    names = ', '.join(os.path.basename(dataset.images[index]) for index in third)
    what = {'nan': 'loss became nan', 'gradient': 'gradient became infinite or NaN'}
    assert f'the {what.get(how, "loss became ")}' in str(error.value)
    assert f'in epoch 1, batch 3, with the pictures {names}. ' in str(error.value) and '\n' not in str(error.value)

    assert len(after) == 2
    now = copies(optimizer)
    assert len(now) >= 4 and all(torch.equal(now[key], after[1][key]) for key in now)
    assert all(tensor.isfinite().all() for tensor in now.values())
    assert not any(torch.equal(after[0][key], after[1][key]) for key in now)
    with open(path, 'rb') as file:
        assert file.read() == checkpoint


def test_processes_stop_together(folder):
    """Of two processes, the second has the picture, and says so; neither changes its weights after it."""
    result = subprocess.run(command(2, 'spoiled', folder), capture_output=True, text=True, env=no_gpu)
    assert result.returncode != 0
    dataset, sampler = PascalVOCDataset(folder, 'TRAIN'), EpochSampler(40, 0, process=1, n_processes=2)
    names = ', '.join(os.path.basename(dataset.images[index]) for index, _ in list(sampler)[4:8])
    assert result.stderr.count(f'Error: the loss became nan in epoch 0, batch 2, with the pictures {names}. ') == 1
    assert result.stderr.count('Error: the gradient or the loss of another process became infinite or NaN') == 1
    for process in range(2):
        with open(os.path.join(folder, f'changes {process}.json')) as file:
            assert json.load(file) == [True]  # one step was taken


@pytest.mark.parametrize('max_norm', [0.1, 100.])
def test_clipping_shortens_the_gradient_to_at_most_its_limit(folder, max_norm):
    steps = []
    for grad_clip in (None, max_norm):
        torch.manual_seed(0)
        model = TinyDetector(4)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.)
        before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
        train_loader = DataLoader(PascalVOCDataset(folder, 'TRAIN'), 4, sampler=EpochSampler(4, seed=0),
                                  collate_fn=collate_fn)
        train.train(train_loader, model, MultiBoxLoss(model.priors_cxcy), optimizer, 0, grad_clip=grad_clip)
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - before)
    length = steps[0].norm()
    assert 0.3 < length < 50
    torch.testing.assert_close(steps[1], steps[0] * min(1, max_norm / length), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize('batch_size, n_batches', [(1, 40), (32, 2), (13, 4)])  # the last: three batches, and one of 1
def test_batch_sizes(folder, tmp_path, capsys, batch_size, n_batches):
    path = str(tmp_path / 'c.pth')
    model = TinyDetector(4)
    train.fit(model, train.make_optimizer(model, 1e-4, 0.9, 5e-4), PascalVOCDataset(folder, 'TRAIN', True), path, 1,
              batch_size, print_freq=1)
    assert capsys.readouterr().out.count('\n') == n_batches
    assert all(values.isfinite().all() for values in load_checkpoint(path)['model'].values())


# ------------------------------------------------------------------------------------------- Processes, full disks

common_settings = {'pretrained': None, 'batch_size': 4, 'workers': 0, 'print_freq': 1, 'lr': 1e-5,
                   'checkpoint_path': 'c.pth'}


def train_here(monkeypatch, folder, **settings):
    """Run train.py's main with a tiny network, in a folder with lists."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train, 'SSD300', TinyDetector)
    for name, value in {**common_settings, **settings}.items():
        monkeypatch.setattr(train, name, value)
    train.main()


def listen_to_ctrl_c():
    """A shell's background processes, and what they start, do not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start_training():
    """A function that starts train.py with a tiny network, in a folder with lists; none outlives the test."""
    started = []

    def start(folder, **settings):
        started.append(start_process(folder, settings))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def start_process(folder, settings):
    """Start train.py with a tiny network; the process."""
    settings = {**common_settings, **settings}
    program = ('import files, train\nfrom tiny import TinyDetector\ntrain.SSD300 = TinyDetector\n'
               + ''.join(f'train.{name} = {value!r}\n' for name, value in settings.items())
               + 'if __name__ == "__main__":\n    files.run(train.main)')
    return subprocess.Popen([sys.executable, '-u', '-c', program], cwd=folder, stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, start_new_session=True, preexec_fn=listen_to_ctrl_c,
                            env=no_gpu | {'PYTHONPATH': f'{root}:{root}/tests', 'OMP_NUM_THREADS': '1'})


def wait_for(process, text):
    """Read what a process prints, up to a line with this text."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f'ended without {text!r}: {process.stderr.read()}')


def copy_lists(folder, tmp_path):
    """Copy the lists, not the pictures."""
    for name in os.listdir(folder):
        if name.endswith('.json'):
            shutil.copy(os.path.join(folder, name), tmp_path)


def none_runs(pids, seconds):
    """Whether all of these processes end within so many seconds."""
    until = time.time() + seconds
    while any(map(runs, pids)) and time.time() < until:
        time.sleep(0.1)
    return len(pids) > 0 and not any(map(runs, pids))


@pytest.mark.parametrize('progress, line', [
    ('epoch 0  batch 1/', 'Stopped. There is no checkpoint yet.\n'),
    ('epoch 2  batch 1/', 'Stopped. The last checkpoint is c.pth.\n')])
def test_ctrl_c_names_the_last_checkpoint(folder, tmp_path, start_training, progress, line):
    copy_lists(folder, tmp_path)
    process = start_training(tmp_path, workers=2, epochs=10 ** 6)
    wait_for(process, progress)
    workers = workers_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it, too
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, line)
    assert len(workers) >= 2 and none_runs(workers, 10)
    assert not (tmp_path / 'c.pth.tmp').exists()
    if 'no checkpoint' not in line:
        assert load_checkpoint(tmp_path / 'c.pth')['epoch'] >= 1


def test_no_worker_outlives_a_killed_training(folder, tmp_path, start_training):
    copy_lists(folder, tmp_path)
    process = start_training(tmp_path, workers=2, epochs=10 ** 6)
    wait_for(process, 'epoch 0  batch 2/')
    workers = workers_of(process.pid)
    process.kill()
    process.wait()
    assert len(workers) >= 2 and none_runs(workers, 30)


def test_a_killed_worker_ends_training_with_our_line(folder, tmp_path, start_training):
    copy_lists(folder, tmp_path)
    process = start_training(tmp_path, workers=2, epochs=10 ** 6)
    wait_for(process, 'epoch 0  batch 2/')
    workers = workers_of(process.pid)
    os.kill(max(workers), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    # Lines before it can be Python's own: that the news of the kill came in the middle of tidying up.
    assert errors.splitlines()[-1].startswith('Error: a process that loads pictures was killed')
    assert none_runs(workers, 10)


news_of_a_death = [
    RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. '),
    RuntimeError('DataLoader worker (pid(s) 7, 8) exited unexpectedly'),
    RuntimeError('Pin memory thread exited unexpectedly'), RuntimeError('received 0 items of ancdata'),
    RuntimeError('Invalid data received'), ConnectionResetError(104, 'Connection reset by peer'),
    ConnectionRefusedError(111, 'Connection refused'), BrokenPipeError(32, 'Broken pipe'),
    FileNotFoundError(2, 'No such file or directory'), OSError('got end of file during message'), EOFError(),
    EOFError('unexpected EOF')]


def last_line(function):
    """The line that ends a script whose main this function is."""
    with pytest.raises(SystemExit) as stop:
        run(function)
    return stop.value.code


@pytest.fixture
def fail_to_load(monkeypatch):
    """A function that lets all data loaders with workers fail with an error, at the second batch."""
    monkeypatch.setattr(datasets.time, 'sleep', lambda _: None)

    def fail(error):
        loaded, plain = [], torch.utils.data.dataloader._MultiProcessingDataLoaderIter._next_data

        def next_data(self):
            loaded.append(1)
            if len(loaded) == 2:
                raise error
            return plain(self)
        monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, '_next_data', next_data)
    return fail


class FakeLoader(list):
    """Batches, and an error in the place of one."""

    num_workers = 1

    def __iter__(self):
        for batch in list.__iter__(self):
            if isinstance(batch, Exception):
                raise batch
            yield batch


@pytest.mark.parametrize('error', news_of_a_death, ids=lambda error: f'{type(error).__name__} {error}')
def test_a_killed_worker_is_named_however_the_news_comes(monkeypatch, error):
    monkeypatch.setattr(datasets.time, 'sleep', lambda _: None)
    batches = load_batches(FakeLoader([1, error]))
    assert next(batches) == 1
    assert last_line(lambda: next(batches)) == f'Error: {killed_worker}' and 'lower workers' in killed_worker


def test_training_and_evaluation_name_a_killed_worker(folder, tmp_path, fail_to_load):
    def fit():
        model = TinyDetector(4)
        train.fit(model, train.make_optimizer(model, 1e-3, 0.9, 5e-4), PascalVOCDataset(folder, 'TRAIN', True),
                  str(tmp_path / 'c.pth'), 1, 4, workers=1)

    def evaluate():
        eval_script.evaluate(DataLoader(PascalVOCDataset(folder, 'TEST'), 1, collate_fn=collate_fn, num_workers=1),
                             TinyDetector(4))

    for script in (fit, evaluate):
        fail_to_load(ConnectionResetError(104, 'Connection reset by peer'))
        assert last_line(script) == f'Error: {killed_worker}'


def test_the_signal_that_a_worker_was_killed_ends_in_the_same_line(monkeypatch):
    """It comes while the last batch is worked on; or after other news, and does not interrupt the end."""
    def work():
        for _ in load_batches(FakeLoader([1, 2])):
            raise news_of_a_death[0]

    def signal_comes(_):
        raise news_of_a_death[0]

    assert last_line(work) == f'Error: {killed_worker}'
    monkeypatch.setattr(datasets.time, 'sleep', signal_comes)
    with pytest.raises(UserError, match=killed_worker):
        list(load_batches(FakeLoader([EOFError()])))


class Unlucky(torch.utils.data.Dataset):
    """Its only picture can't be loaded."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, i):
        raise self.error


@pytest.mark.parametrize('workers', [0, 1])
def test_errors_of_workers_that_live_keep_their_lines(workers):
    def load(error):
        return lambda: list(load_batches(DataLoader(Unlucky(error), num_workers=workers)))

    assert last_line(load(UserError('a.jpg is broken'))) == 'Error: a.jpg is broken'
    assert last_line(load(PermissionError(13, 'Permission denied', 'a.jpg'))).endswith("denied: 'a.jpg'")
    with pytest.raises(RuntimeError, match='shapes do not fit'):
        run(load(RuntimeError('shapes do not fit')))


def test_errors_from_elsewhere_keep_their_lines():
    def read_checkpoint():
        for _ in load_batches(FakeLoader([1])):
            raise FileNotFoundError(2, 'No such file or directory', 'c.pth')

    assert last_line(read_checkpoint) == "Error: [Errno 2] No such file or directory: 'c.pth'"
    many = RuntimeError('Too many open files. Please increase the limit\nusing `ulimit -n`')
    line = last_line(lambda: list(load_batches(FakeLoader([many]))))
    assert line == 'Error: Too many open files. Please increase the limit using `ulimit -n`'


def test_a_truncated_picture_is_named_by_a_worker_and_no_worker_stays(folder, tmp_path, start_training):
    copy_lists(folder, tmp_path)
    images = json.loads((tmp_path / 'TRAIN_images.json').read_text())
    with open(images[0], 'rb') as file:
        (tmp_path / 'cut.jpg').write_bytes(file.read()[:4000])
    Image.open(tmp_path / 'cut.jpg')  # the header is whole: only a worker finds out
    images[7] = str(tmp_path / 'cut.jpg')
    (tmp_path / 'TRAIN_images.json').write_text(json.dumps(images))
    process = start_training(tmp_path, workers=2, epochs=1)
    wait_for(process, 'Training on')
    workers = set()
    while process.poll() is None:
        workers |= set(workers_of(process.pid))
        time.sleep(0.02)
    errors = process.stderr.read()
    assert process.returncode == 1 and errors.count('\n') == 1
    assert errors.startswith(f'Error: {tmp_path / "cut.jpg"} is not a picture that can be read') and 'truncat' in errors
    assert none_runs(list(workers), 10)


def test_a_full_disk_leaves_the_last_checkpoint(folder, tmp_path, start_training, monkeypatch):
    """A limit on the size of files stands in for the disk; training goes on when there is room again."""
    copy_lists(folder, tmp_path)
    train_here(monkeypatch, tmp_path, epochs=1)
    before = {name: (tmp_path / name).read_bytes() for name in ('c.pth', 'c.csv')}
    limit = len(before['c.pth']) // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    process = start_training(tmp_path, epochs=2, checkpoint='c.pth')
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, hard))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and errors.count('\n') == 1
    assert errors.startswith('Error: c.pth could not be written, and what was there before is as it was: ')
    assert 'File too large' in errors
    assert (tmp_path / 'c.pth').read_bytes() == before['c.pth'] and not (tmp_path / 'c.pth.tmp').exists()
    assert (tmp_path / 'c.csv').read_bytes().startswith(before['c.csv'])
    train_here(monkeypatch, tmp_path, epochs=2, checkpoint='c.pth')
    assert load_checkpoint(tmp_path / 'c.pth')['epoch'] == 1


def test_an_error_without_a_message_is_still_a_line():
    def fail():
        raise OSError

    with pytest.raises(SystemExit) as stop:
        run(fail)
    assert stop.value.code == 'Error: OSError'


# ----------------------------------------------------------------------------------------------------- Checkpoints

def test_training_does_not_keep_the_checkpoint_it_went_on_from(folder, tmp_path, monkeypatch):
    """It is read to the CPU, and when training begins, the model's weights are the only ones."""
    copy_lists(folder, tmp_path)
    train_here(monkeypatch, tmp_path, epochs=1)
    loaded, seen = [], []

    def load(*args):
        saved = load_checkpoint(*args)
        assert torch.device(*args[1:] or ['cpu']) == torch.device('cpu')
        loaded.extend(weakref.ref(tensor) for tensor in saved['model'].values())
        return saved

    def fit(model, optimizer, *_, **__):
        seen.append([ref() is None for ref in loaded])
        assert all(optimizer.state[p]['momentum_buffer'].any() for p in model.parameters())
    monkeypatch.setattr(train, 'load_checkpoint', load)
    monkeypatch.setattr(train, 'fit', fit)
    train_here(monkeypatch, tmp_path, epochs=2, checkpoint='c.pth')
    assert seen == [[True, True]]


kept_checkpoint = os.path.join(root, 'tests', 'checkpoint_version_1.pth')


def write_kept_checkpoint(path):
    """
    Write a checkpoint of SSD300 with save_checkpoint, as training does, but small: each weight tensor has but one
    value, and so has its momentum, which the file holds once. Call it with a new name when checkpoint_version changes.

    :param path: the file
    """
    model, label_map = SSD300(n_classes=3), {'background': 0, 'cat': 1, 'dog': 2}
    optimizer = train.make_optimizer(model, 1e-3, 0.9, 5e-4)
    values = torch.arange(1000.)
    for i, parameter in enumerate(model.parameters()):
        parameter.data = values[i:i + 1].expand(parameter.shape)
        optimizer.state[parameter]['momentum_buffer'] = values[500 + i:501 + i].expand(parameter.shape)
    model.priors_cxcy = values[:4].expand(8732, 4)
    save_checkpoint(path, 7, model, optimizer, label_map, seed=11)


def test_a_checkpoint_of_version_1_is_read():
    assert os.path.getsize(kept_checkpoint) < 100_000
    saved = load_checkpoint(kept_checkpoint)
    assert (saved['version'], saved['epoch'], saved['seed']) == (1, 7, 11)
    assert saved['label_map'] == {'background': 0, 'cat': 1, 'dog': 2}
    model = SSD300.from_checkpoint(saved)
    assert torch.equal(model.priors_cxcy, torch.arange(4.).expand(8732, 4))
    optimizer = train.make_optimizer(model, 1e-3, 0.9, 5e-4)
    optimizer.load_state_dict(saved['optimizer'])
    assert [group['lr'] for group in optimizer.param_groups] == [2e-3, 1e-3]
    for i, parameter in enumerate(model.parameters()):
        assert (parameter == i).all()
        assert (optimizer.state[parameter]['momentum_buffer'] == 500 + i).all()


@pytest.mark.parametrize('change, line', [
    ({'version': 2}, 'has version 2, and is from a newer version of this project, which writes version 1'),
    ({'epoch': None}, "lacks ['epoch']"), ({'label_map': ['cat', 'dog']}, "lacks ['label_map']"),
    ({'model': 3, 'optimizer': []}, "lacks ['model', 'optimizer']"),
    ({'priors_cxcy': torch.zeros(8732, 3)}, 'is damaged'),
    ({'label_map': {'background': 0, 'cat': 9, 'dog': 2}}, 'is damaged')])
def test_checkpoints_that_cannot_be_used_are_named(tmp_path, change, line):
    saved = load_checkpoint(kept_checkpoint)
    torch.save(saved | change, tmp_path / 'c.pth')
    with pytest.raises(UserError, match='c.pth') as error:
        load_checkpoint(tmp_path / 'c.pth')
    assert line in str(error.value) and '\n' not in str(error.value)


def test_another_number_of_priors_is_named():
    saved = load_checkpoint(kept_checkpoint) | {'priors_cxcy': torch.rand(3, 4)}
    with pytest.raises(UserError, match='c.pth has 3 priors, but feature_maps in utils.py make 8732'):
        SSD300.from_checkpoint(saved, 'c.pth')


def test_training_does_not_overwrite_another_checkpoint(folder, tmp_path, monkeypatch):
    for name in ('mine.pth', 'another.pth'):
        shutil.copy(kept_checkpoint, tmp_path / name)
    for name, value in (('data_folder', folder), ('checkpoint', str(tmp_path / 'mine.pth')),
                        ('checkpoint_path', str(tmp_path / 'another.pth'))):
        monkeypatch.setattr(train, name, value)
    with pytest.raises(UserError, match='another.pth exists'):
        train.main()


def test_training_goes_on_with_other_pictures(folder, tmp_path, monkeypatch, capsys):
    """Of 40 pictures, 33 are left."""
    copy_lists(folder, tmp_path)
    train_here(monkeypatch, tmp_path, epochs=1)
    for name in ('TRAIN_images.json', 'TRAIN_objects.json'):
        (tmp_path / name).write_text(json.dumps(json.loads((tmp_path / name).read_text())[7:]))
    train_here(monkeypatch, tmp_path, epochs=2, checkpoint='c.pth')
    assert 'epoch 1  batch 9/9' in capsys.readouterr().out
    assert load_checkpoint(tmp_path / 'c.pth')['epoch'] == 1


def test_lists_that_do_not_belong_together_are_refused(folder, tmp_path):
    """As if the lists were copied one by one, or replaced while they were read."""
    copy_lists(folder, tmp_path)
    images = json.loads((tmp_path / 'TRAIN_images.json').read_text())
    (tmp_path / 'TRAIN_images.json').write_text(json.dumps(images[1:]))
    (tmp_path / 'label_map.json').write_text('{"background": 0, "circle": 1}')
    for split in ('TRAIN', 'TEST'):
        with pytest.raises(UserError, match=f'lists of {split} in .* do not belong together'):
            PascalVOCDataset(tmp_path, split)
