# ruff: noqa: RUF001 - other scripts have letters like Latin ones
"""Short texts in the language of a tokenizer, to try a model without own texts."""

from __future__ import annotations

import math
import random
from typing import Any

#: the same everyday sentences in languages of published T5 models
_SENTENCES = {
    "English": (
        "Good morning.",
        "The weather is very nice today.",
        "I drink coffee every morning.",
        "Tomorrow I will go to the cinema with a friend.",
        "The cat is sleeping by the window.",
        "Excuse me, where is the station?",
        "This apple is sweet and tastes good.",
        "The train was late, so we missed the first lesson.",
    ),
    "German": (
        "Guten Morgen.",
        "Das Wetter ist heute sehr schön.",
        "Ich trinke jeden Morgen Kaffee.",
        "Morgen gehe ich mit einer Freundin ins Kino.",
        "Die Katze schläft am Fenster.",
        "Entschuldigung, wo ist der Bahnhof?",
        "Dieser Apfel ist süß und schmeckt gut.",
        "Der Zug hatte Verspätung, deshalb haben wir die erste Stunde verpasst.",
    ),
    "French": (
        "Bonjour.",
        "Il fait très beau aujourd'hui.",
        "Je bois du café tous les matins.",
        "Demain, j'irai au cinéma avec un ami.",
        "Le chat dort près de la fenêtre.",
        "Excusez-moi, où est la gare ?",
        "Cette pomme est sucrée et elle a bon goût.",
        "Le train était en retard, nous avons donc manqué le premier cours.",
    ),
    "Spanish": (
        "Buenos días.",
        "Hoy hace muy buen tiempo.",
        "Bebo café todas las mañanas.",
        "Mañana iré al cine con un amigo.",
        "El gato duerme junto a la ventana.",
        "Perdone, ¿dónde está la estación?",
        "Esta manzana es dulce y sabe bien.",
        "El tren llegó tarde, así que perdimos la primera clase.",
    ),
    "Portuguese": (
        "Bom dia.",
        "Hoje o tempo está muito bom.",
        "Eu bebo café todas as manhãs.",
        "Amanhã vou ao cinema com um amigo.",
        "O gato está dormindo perto da janela.",
        "Com licença, onde fica a estação?",
        "Esta maçã é doce e saborosa.",
        "O trem atrasou, por isso perdemos a primeira aula.",
    ),
    "Russian": (
        "Доброе утро.",
        "Сегодня очень хорошая погода.",
        "Я пью кофе каждое утро.",
        "Завтра я пойду в кино с другом.",
        "Кошка спит у окна.",
        "Извините, где находится вокзал?",
        "Это яблоко сладкое и вкусное.",
        "Поезд опоздал, поэтому мы пропустили первый урок.",
    ),
    "Chinese": (
        "早上好。",
        "今天天气很好。",
        "我每天早上喝咖啡。",
        "明天我要和朋友去看电影。",
        "猫在窗户旁边睡觉。",
        "请问,车站在哪里?",
        "这个苹果又甜又好吃。",
        "火车晚点了,所以我们错过了第一节课。",
    ),
    "Japanese": (
        "おはようございます。",
        "今日はとても良い天気ですね。",
        "私は毎朝コーヒーを飲みます。",
        "明日、友達と映画を見に行きます。",
        "猫が窓のそばで寝ています。",
        "すみません、駅はどこですか。",
        "このりんごは甘くておいしいです。",
        "電車が遅れたので、一時間目の授業に出られませんでした。",
    ),
    "Japanese kana": (
        "おはようございます。",
        "きょうは とても よい てんきですね。",
        "わたしは まいあさ コーヒーを のみます。",
        "あした ともだちと えいがを みに いきます。",
        "ねこが まどの そばで ねています。",
        "すみません、えきは どこですか。",
        "この りんごは あまくて おいしいです。",
        "でんしゃが おくれたので、じゅぎょうに でられませんでした。",
    ),
    "Korean": (
        "안녕하세요.",
        "오늘은 날씨가 아주 좋네요.",
        "저는 매일 아침 커피를 마십니다.",
        "내일 친구와 영화를 보러 갑니다.",
        "고양이가 창문 옆에서 자고 있습니다.",
        "실례합니다, 역이 어디에 있습니까?",
        "이 사과는 달고 맛있습니다.",
        "기차가 늦어서 첫 수업을 듣지 못했습니다.",
    ),
    "Arabic": (
        "صباح الخير.",
        "الطقس جميل جدا اليوم.",
        "أشرب القهوة كل صباح.",
        "غدا سأذهب إلى السينما مع صديق.",
        "القطة نائمة بجانب النافذة.",
        "عفوا، أين المحطة؟",
        "هذه التفاحة حلوة ولذيذة.",
        "تأخر القطار ففاتنا الدرس الأول.",
    ),
    "Hindi": (
        "सुप्रभात।",
        "आज मौसम बहुत अच्छा है।",
        "मैं हर सुबह कॉफ़ी पीता हूँ।",
        "कल मैं एक दोस्त के साथ सिनेमा जाऊँगा।",
        "बिल्ली खिड़की के पास सो रही है।",
        "माफ़ कीजिए, स्टेशन कहाँ है?",
        "यह सेब मीठा और स्वादिष्ट है।",
        "ट्रेन देर से आई, इसलिए हमारी पहली कक्षा छूट गई।",
    ),
    "Vietnamese": (
        "Chào buổi sáng.",
        "Hôm nay thời tiết rất đẹp.",
        "Tôi uống cà phê mỗi buổi sáng.",
        "Ngày mai tôi sẽ đi xem phim với một người bạn.",
        "Con mèo đang ngủ bên cửa sổ.",
        "Xin lỗi, nhà ga ở đâu?",
        "Quả táo này ngọt và ngon.",
        "Tàu đến muộn nên chúng tôi đã lỡ tiết học đầu tiên.",
    ),
}
#: largest share of unknown tokens in texts of a language that a tokenizer supports
_UNKNOWN = 0.1
#: a vocabulary of at most this size is no basis for texts: Transformers invents a tokenizer if a checkpoint has none
_FEW = 8


def sample_texts(tokenizer: Any) -> tuple[list[str], str]:
    """Sixteen texts, and a description of them.

    The language is the one whose sentences take the fewest tokens: a tokenizer has long pieces for the language that it was trained on.
    If it knows none of them, words are drawn from its vocabulary; the list is empty if there is no vocabulary.

    Args:
        tokenizer: of a checkpoint.
    """
    counts = {name: _token_count(tokenizer, sentences) for name, sentences in _SENTENCES.items()}
    language = min(counts, key=lambda name: counts[name])
    if counts[language] == math.inf:
        return _of_vocabulary(tokenizer), "words of the tokenizer's vocabulary"
    sentences = _SENTENCES[language]
    pairs = zip(sentences, sentences[1:] + sentences[:1], strict=True)
    return [*sentences, *map(" ".join, pairs)], f"sentences in {language}"


def _token_count(tokenizer: Any, sentences: tuple[str, ...]) -> float:
    """Number of tokens of all sentences; infinite if too many are unknown."""
    rows = tokenizer(list(sentences), add_special_tokens=False)["input_ids"]
    tokens = [token for row in rows for token in row]
    unknown = tokens.count(tokenizer.unk_token_id)
    return math.inf if not tokens or unknown > _UNKNOWN * len(tokens) else len(tokens)


def _of_vocabulary(tokenizer: Any) -> list[str]:
    special = set(tokenizer.all_special_ids)
    tokens = sorted(token for token in tokenizer.get_vocab().values() if token not in special)
    if len(tokens) < _FEW:
        return []
    draw = random.Random(0)
    return [tokenizer.decode(draw.choices(tokens, k=length)) for length in range(2, 18)]
