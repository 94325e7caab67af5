"""The words of the stories, about 1500: those that a child knows.

Each list begins with its most frequent words. Verbs come as they are called and as they were done:
"run ran". Plurals and past forms that follow a rule are made by `plural` and `past`.
"""

GIRLS = """Lily Mia Anna Sue Emma Ella Lucy Rose Amy Zoe Nora Ruby Clara Daisy Grace Molly Sara Jane
Kate Alice Betty Cindy Dora Eva Fiona Gina Hanna Ivy Julia Kim Lola Maya Nina Olive Polly Rita Sally
Tina Vera Wendy Bella Carol Diana Elsa Flora Heidi Iris Judy Laura Mary""".split()
BOYS = """Tom Ben Tim Max Sam Jack Leo Bob Joe Dan Sid Adam Bill Carl Dave Eric Fred Gus Hugo Ian
Jim Karl Luke Mark Ned Oscar Paul Ray Rob Seth Ted Victor Will Alex Bruno Colin Dennis Ethan Felix
George Harry Ivan Jacob Kevin Louis Mike Nick Otto Peter Simon""".split()

BEINGS = """dog cat bird bear rabbit boy girl frog duck friend fox horse cow pig lion owl turtle
baby squirrel monkey king queen farmer elephant bee ant spider snake dragon fairy mother father
brother sister teacher doctor hen goat lamb kitten puppy pony tiger whale dolphin crab snail worm
butterfly beetle parrot swan eagle crow robin hedgehog mole badger otter beaver zebra giraffe camel
penguin seal shark crocodile lizard toad dinosaur giant witch wizard princess knight pirate sailor
baker painter singer dancer driver neighbor uncle aunt cousin nurse robot monster ghost clown elf
pilot hunter gardener""".split()

THINGS = """ball toy box tree book hat flower car stone stick boat cup bag doll bed door shoe bell
chair kite picture train table star lamp rope drum key coat sock blanket bucket basket crayon pencil
pen paintbrush puzzle block truck wagon bike wheel swing slide tent pillow mirror clock window
ladder hammer nail saw shovel rake pot pan spoon fork plate bowl bottle jar candle map letter stamp
card coin ring crown necklace button ribbon scarf glove mitten boot jacket dress skirt shirt
umbrella balloon whistle horn trumpet guitar piano violin flute song game marble top robe curtain
carpet broom sponge towel brush comb needle thread string net hook cage nest egg feather shell
pebble rock brick log branch root seed bush rose tulip daisy vine fence gate wall roof tower bridge
road path sign flag pole pipe tube wire light torch lantern fire cloud rainbow snowman snowball sled
skate raft anchor sail oar rocket plane ship engine machine camera phone radio computer screen desk
drawer lid lock chain bracelet purse wallet suitcase present gift prize medal trophy ticket poster
statue mask costume cape sword shield bow arrow wand potion carriage saddle kettle oven stove fridge
sink bath tray mat rug cushion sofa bench stool""".split()

FOODS = """cake apple cookie berry banana carrot pie sandwich candy soup egg pear orange lemon peach
plum cherry grape melon nut pea bean potato onion pumpkin mushroom pizza pancake muffin bun roll
biscuit cracker sausage noodle salad pickle pepper olive fig date raisin almond walnut chestnut
acorn waffle donut pudding jelly lollipop omelet burger taco tart bagel cupcake strawberry
blueberry""".split()
PLACES = """park garden house forest room lake river hill beach school kitchen farm shop field yard
pond sea barn cave castle mountain market village town city street road bridge playground zoo
library hospital bakery church museum station harbor island desert jungle meadow valley woods swamp
attic cellar hall tent stable tower bedroom bathroom classroom office store restaurant theater
circus pool stream waterfall cliff camp cabin cottage palace tunnel mill well shed garage
roof""".split()

LOOKS = """big little red small old new pretty blue green yellow long soft shiny white black brown
round tall nice good funny clean dirty heavy tiny huge warm cold wet dry hard smooth fast slow quiet
loud strange magic pink purple orange gray golden silver bright dark thin thick wide deep high low
short empty full broken open fluffy furry fuzzy sticky muddy dusty rusty wooden plain fancy lovely
ugly beautiful wonderful amazing perfect special favorite colorful striped spotted square flat curly
straight sharp smelly sweet fresh hot cool strong weak young gentle noisy silent secret hidden lost
forgotten ancient modern simple easy difficult important interesting ordinary enormous massive
mighty sparkling glowing gleaming frozen melted crooked bent cracked torn folded painted carved
knitted polished velvet icy oily""".split()
TASTES = """sweet tasty yummy big good hot red fresh warm little ripe juicy sour soft cold delicious
salty green crunchy spicy creamy round bitter golden crispy sticky raw frozen huge old""".split()
FEELINGS = """happy sad scared tired angry proud hungry excited glad lonely kind brave shy surprised
thirsty sleepy bored curious worried sorry safe calm cheerful careful clever silly grumpy jealous
nervous lucky thankful polite patient busy friendly generous helpful honest afraid upset ashamed
confused amazed delighted hopeful gentle rude lazy naughty selfish""".split()

VERBS = """run ran; jump; play; laugh; sleep slept; walk; cry cried; smile; dance; sing sang; swim
swam; climb; wait; hide hid; fly flew; fall fell; stop stopped; work; rest; shout; stand stood; sit
sat; talk; whisper; giggle; skip skipped; hop hopped; crawl; dream; yawn; sneeze; wave; nod nodded;
listen; shiver; tremble; rush; hurry hurried; march; slide slid; slip slipped; stumble; kneel knelt;
spin spun; float; dive; camp; whistle; cough; snore; grin grinned; sigh; wander; travel; arrive;
return; vanish; wink; bow; stretch"""
ON_THINGS = """find found; see saw; take took; want; like; love; make made; get got; have had; buy
bought; lose lost; hold held; bring brought; give gave; open; close; break broke; fix; paint; draw
drew; carry carried; throw threw; catch caught; pull; push; clean; wash; hide hid; share; keep kept;
touch; drop dropped; kick; build built; lift; move; cover; fill; pick; choose chose; borrow; sell
sold; drag dragged; hug hugged; need; show showed; hear heard; watch; admire; notice; forget forgot;
remember; use; burn; wrap wrapped; polish; decorate; measure; count; sort; collect; steal stole;
return; repair; examine; remove; bury buried; destroy; shake shook"""
ON_BEINGS = """see saw; help; love; meet met; hug hugged; find found; like; thank; follow; visit;
call; kiss; chase; watch; teach taught; feed fed; hear heard; miss; save; catch caught; greet;
invite; tickle; scare; trust; ask; tell told; answer; forgive forgave; rescue; protect; pet petted;
surprise; wake woke; comfort; join; warn; lead led; copy copied; tease; praise; remember; push;
guard; know knew; believe; obey; welcome"""
ON_FOODS = """eat ate; like; taste; cook; share; bake; want; buy bought; smell; make made; love;
chew; bite bit; swallow; nibble; cut cut; peel; serve; slice; mix; steal stole; finish; gobble;
bring brought; offer; enjoy"""

HOW = """quickly slowly happily together quietly away again loudly outside inside sadly around
carefully gently softly back proudly bravely kindly nicely everywhere upstairs downstairs silently
angrily politely eagerly cheerfully nervously gracefully suddenly lazily sleepily hungrily calmly
merrily wildly nearby alone outdoors forever early late today twice home""".split()
WHEN = """then soon later suddenly finally yesterday afterwards sometimes once now meanwhile
tonight""".split()
WHERE = "in at near behind to from by around outside beyond inside above below past".split()
COUNTS = "two three some many four five six few seven eight nine ten several twelve".split()


def plural(noun: str) -> str:
    """By the rules of spelling.

    >>> plural("dog"), plural("fox"), plural("baby"), plural("toy"), plural("potato")
    ('dogs', 'foxes', 'babies', 'toys', 'potatoes')
    """
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh", "potato")) else "s")


def past(verb: str) -> str:
    """By the rules of spelling, for verbs that double no letter.

    >>> past("jump"), past("like"), past("marry"), past("play")
    ('jumped', 'liked', 'married', 'played')
    """
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + ("d" if verb.endswith("e") else "ed")


def verbs(text: str) -> list[tuple[str, str]]:
    """(as it is called, as it was done) of each.

    >>> verbs("run ran; jump")
    [('run', 'ran'), ('jump', 'jumped')]
    """
    forms = [verb.split() for verb in text.split(";")]
    return [(form[0], form[1] if form[1:] else past(form[0])) for form in forms]
