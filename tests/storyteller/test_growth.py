import torch
from transformers import LlamaConfig, LlamaForCausalLM

from serve.storyteller.growth import grow, student_config
from serve.storyteller.teacher import EOS_ID, TEACHER_EOS_ID


def tiny_teacher() -> LlamaForCausalLM:
    """The teacher's proportions with random weights and norms."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    teacher = LlamaForCausalLM(config)
    for name, parameter in teacher.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return teacher.eval()


@torch.no_grad()
def test_the_grown_model_computes_the_teachers_function() -> None:
    teacher, student = tiny_teacher(), LlamaForCausalLM(student_config()).eval()
    grown = grow(teacher.state_dict(), student.state_dict(), (16, 32), torch.Generator().manual_seed(1))
    student.load_state_dict(grown)
    ids = torch.randint(3, 200, (2, 48))
    expected, logits = teacher(ids).logits, student(ids).logits[..., :256]
    swapped = torch.arange(256)
    swapped[[EOS_ID, TEACHER_EOS_ID]] = swapped[[TEACHER_EOS_ID, EOS_ID]]
    torch.testing.assert_close(logits[..., swapped], expected, atol=1e-3, rtol=1e-3)


def test_every_grown_weight_can_learn() -> None:
    """No new part is cut off: after a few steps everything has moved."""
    teacher, student = tiny_teacher(), LlamaForCausalLM(student_config())
    student.load_state_dict(grow(teacher.state_dict(), student.state_dict(), (16, 32), torch.Generator()))
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    ids = torch.randint(3, 200, (2, 32))
    for _ in range(3):
        optimizer.zero_grad()
        student(ids, labels=ids).loss.backward()
        optimizer.step()
    assert all((parameter != before[name]).float().mean() > 0.95 for name, parameter in student.named_parameters())
