"""
Write a checkpoint as the earlier implementation does: the whole model and the optimizer, pickled. This was run with
PyTorch 1.0.1 (Python 3.7) and 1.4.0 (Python 3.8), from a folder where the packages have short relative paths:

    python tests/earlier/write.py tests/earlier_torch_1.0.1.pth

Each tensor has but one value, which the file holds once. Or it has the weights and priors of a second file; and a newer
version of PyTorch writes a third file, in the old format.
"""
import sys

import torch

from model import SSD300

values = torch.arange(1000.)
model = SSD300(21, torch.zeros(1, 512, 1, 1), values[:4].expand(8732, 4))
parameters = sorted(model.named_parameters())
if len(sys.argv) > 2:
    weights = torch.load(sys.argv[2])
    model.priors_cxcy = weights.pop('priors_cxcy')
    model.load_state_dict(weights)
else:
    for i, (_, parameter) in enumerate(parameters):
        parameter.data = values[i:i + 1].expand(parameter.shape)

optimizer = torch.optim.SGD([{'params': [p for name, p in parameters if name.endswith('.bias')], 'lr': 2e-3},
                             {'params': [p for name, p in parameters if not name.endswith('.bias')]}],
                            lr=1e-3, momentum=0.9, weight_decay=5e-4)
for _, parameter in parameters:
    optimizer.state[parameter]['momentum_buffer'] = values[500:501].expand(parameter.shape)
content = {'epoch': 7, 'epochs_since_improvement': 2, 'loss': 2.5, 'best_loss': 2.25, 'model': model,
           'optimizer': optimizer}
torch.save(content, sys.argv[1])
if len(sys.argv) > 3:
    torch.save(content, sys.argv[3], _use_new_zipfile_serialization=False)
