"""Words that the retrieval tasks are made of: common nouns, first and last names. Each list has no word twice."""

NOUNS = """
anchor apple apron arrow autumn badge baker balloon banana barrel basket beach beard bell bench berry bicycle bird
blanket boat bottle bowl branch bread breeze brick bridge broom brush bucket butter button cabin cable camel camera
candle canoe canvas captain carpet carrot castle cattle ceiling cellar chain chair chalk cheese cherry chicken chimney
circle clock cloud coach coast coffee collar copper cotton couch cousin cradle crayon cricket crown curtain dancer
desert diamond dinner doctor dolphin donkey dragon drawer dream drum duck eagle earth eleven engine evening falcon
farmer feather fence ferry fiddle finger fisher flag flame flower forest fossil fountain fox friend frog fruit garden
garlic gate ghost giant ginger glass glove goat gold grape grass guitar hammer harbor hat hawk hedge helmet hill honey
horse hotel house husband ink insect iron island ivory jacket jar jewel judge jungle kettle key king kitchen kite
knife ladder lady lake lamp leaf leather lemon letter library lion lizard lobster lock magnet maple marble market
meadow melon mirror monkey moon mother mountain mouse museum mustard nail necklace needle nest night notebook oak
ocean office olive onion orange orchard oven owl oyster paddle palace paper parrot pebble pencil pepper piano picture
pigeon pillow pilot pine planet plate pocket potato powder prince puppet puzzle queen quilt rabbit radio rain ranch
razor ribbon rice river road robin rocket roof rope rose ruby sailor salad salt sand scarf school shadow sheep shell
ship shoe silver sister snow soap soldier spider spoon spring squirrel stable stone storm stove straw street sugar
summer sun table tailor teacher temple thread throat thunder ticket tiger toast tomato tower train tree trumpet tulip
tunnel turtle uncle valley velvet village violin wagon wall walnut water wheel whistle window winter wolf wool yard
""".split()

FIRST_NAMES = """
Alice Andrew Anna Arthur Beth Carl Clara Daniel David Diana Edward Ellen Emma Eric Eva Frank George Grace Harold Helen
Henry Irene Jack Jane John Julia Karen Kevin Laura Leo Linda Lucy Mark Martha Mary Nora Oscar Paul Peter Rachel Robert
Rosa Ruth Samuel Sarah Simon Sophie Stella Susan Thomas Victor Walter William
""".split()

LAST_NAMES = """
Adams Allen Baker Barnes Bell Bennett Brooks Butler Campbell Carter Clark Coleman Collins Cook Cooper Cox Davis Edwards
Evans Fisher Foster Gray Green Griffin Hall Harris Hayes Henderson Hill Howard Hughes Jackson James Jenkins Johnson
Jones Kelly King Lee Lewis Long Marshall Martin Miller Mitchell Moore Morgan Morris Murphy Myers Nelson Parker Perry
Peterson Phillips Powell Price Reed Reynolds Rivera Roberts Rogers Ross Russell Sanders Scott Simmons Smith Stewart
Sullivan Taylor Thompson Turner Walker Ward Watson White Williams Wilson Wood Wright Young
""".split()

# what nothing is asked about: a text between the sentences that matter
SENTENCES = """
The ferry left the harbor before the fog had lifted.
Two of the chairs in the hall had been mended with wire.
She counted the steps to the tower and forgot the number at once.
In spring the road along the river is closed for a week.
The baker opens early on market days and late on all others.
Nobody could say who had painted the gate, or why it was green.
A short letter lay on the table, folded twice.
The old clock in the station is four minutes slow.
They walked past the school and talked about the weather.
Most of the apples had fallen by the end of the month.
The library keeps its maps in the long room on the second floor.
He had borrowed a ladder and brought back a different one.
Rain was expected in the north, but the valley stayed dry.
The children built a bridge of planks over the ditch.
Every evening the same two dogs crossed the square.
The meeting was moved to the afternoon because the key was missing.
A train of twenty cars passed without stopping.
The garden behind the house had not been weeded since the summer.
Her cousin repaired violins and told long stories.
The soup was cold, but there was enough bread for all of them.
At the edge of the forest stood a sign that had lost its letters.
The shop sold rope, nails, lamp oil and three kinds of tea.
Snow fell during the night and was gone before noon.
The captain wrote down the depth and turned the page.
""".strip().splitlines()
